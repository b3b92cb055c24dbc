// Products of many bfloat16 rows with AMX, by weights that are rounded to bfloat16. Included by avx512.cc
// within its namespace, after float_panels_avx512.h and panels_amx.h.

// Elements along K for which a panel stays in the L2 cache.
constexpr int64_t kHalfDepth = 2048;

// Fills vectors of a panel with pairs of the elements k to end, and with zeros up to the end of a tile,
// where scratch memory may hold NaN.
template <typename Values>
void PackHalves(const Weights& w, const Values& values, int64_t n, int64_t k, int64_t end,
                int vectors, float* floats, uint8_t* panel) {
  for (int64_t from = k; from < end; from += kFloatDepth) {
    const int64_t last = std::min(from + kFloatDepth, end);
    PackFloats(w, values, n, from, last, vectors, floats);
    const int64_t count = last - from, padded = (count + kBlock - 1) / kBlock * kBlock;
    std::fill(floats + count * kPanel, floats + padded * kPanel, 0.0f);
    uint8_t* to = panel + (from - k) * 2 * kPanel;
    for (const float* pair = floats; pair < floats + padded * kPanel; pair += 2 * kPanel) {
      for (int v = 0; v < vectors; ++v) {
        Ints even = Rounded(Load(pair + v * kLanes));
        Ints odd = Rounded(Load(pair + kPanel + v * kLanes));
        _mm512_store_si512(to + v * kBytes, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
      }
      to += 4 * kPanel;
    }
  }
}

// The rows `begin` to `end` by the columns of one panel.
template <typename Values>
void OnePanel(const TileRows& x, int64_t begin, int64_t end, const Weights& w,
              const Values& values, int64_t n, float* floats, float* out) {
  const int vectors = std::min<int64_t>(kVectors, (w.N - n + kLanes - 1) / kLanes);
  uint8_t* panel = Scratch<uint8_t>(1, 2 * kHalfDepth * kPanel);
  for (int64_t k = 0; k < w.K; k += kHalfDepth) {
    const int64_t last = std::min(k + kHalfDepth, w.K), first = 2 * k / kStep;
    const int64_t steps = (2 * (last - k) + kStep - 1) / kStep;
    PackHalves(w, values, n, k, last, vectors, floats, panel);
    TileRows::ForBlocks(begin, end, w.N - n, [&](int64_t m, int64_t rows, int v) {
      BlockSums<float> sums;
      MultiplyBlock(x.At(m, first), panel + v * kBytes, steps, sums);
      for (int64_t r = 0; r < rows; ++r)
        for (int j = 0; j < 2; ++j) {
          const int64_t column = n + (v + j) * kLanes;
          const __mmask16 within = ColumnMask(w.N, column);
          float* to = out + (m + r) * w.N + column;
          Floats sum = Load(sums.at[r] + j * kLanes);
          if (k) sum = Add(sum, _mm512_maskz_loadu_ps(within, to));
          _mm512_mask_storeu_ps(to, within, sum);
        }
    });
  }
}
