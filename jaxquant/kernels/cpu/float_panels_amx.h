// Products of many bfloat16 rows with AMX, by weights that are rounded to bfloat16. Included by avx512.cc
// within its namespace, after float_panels_avx512.h and panels_amx.h.

// Elements of a step.
constexpr int64_t kHalves = kStep / 2;

// Of neighboring elements: those of even index, or those of odd index.
struct Neighbors {
  Floats even, odd;
};

// Values of one group or another for the elements of a step.
struct GroupValues {
  const Weights& w;
  std::vector<int32_t> groups;  // of all even elements of a step, then of its odd ones; if they differ

  explicit GroupValues(const Weights& w) : w(w) {
    if (w.G == 1 || w.group() % kHalves == 0) return;
    for (int64_t k = 0; k < w.K; k += kHalves)
      for (int64_t odd : {0, 1})
        for (int64_t i = odd; i < kHalves; i += 2)
          groups.push_back(std::min((k + i) / w.group(), w.G - 1));
  }
  // Of row n, from element k on.
  Neighbors operator()(const float* values, int64_t n, int64_t k) const {
    const float* row = values + n * w.G;
    if (groups.empty()) {
      const Floats all = Broadcast(row[w.G == 1 ? 0 : k / w.group()]);
      return {all, all};
    }
    const auto pick = [&](int64_t i) {
      return _mm512_i32gather_ps(LoadInts(&groups[k + i]), row, sizeof(float));
    };
    return {pick(0), pick(kLanes)};
  }
};

// Two codes of each lane, of one step.
template <typename Values>
inline Ints Codes(const Weights& w, int64_t n, int64_t k) {
  const uint8_t* from = w.at(n, k);
  const int64_t bytes = std::min<int64_t>(kHalves, w.K - k) * Values::kBits / 8;
  const auto within = static_cast<__mmask32>((uint64_t{1} << bytes) - 1);
  const __m256i all = _mm256_maskz_loadu_epi8(within, from);
  if constexpr (Values::kBits == 8) return _mm512_cvtepu16_epi32(all);
  return _mm512_cvtepu8_epi32(_mm256_castsi256_si128(all));
}

template <typename Values>
void TileFloats(ThreadPool& pool, const uint16_t* x, int64_t M, const Weights& w,
                const Values& values, float* out) {
  const Steps steps({0, 2 * w.K});
  const Panels panels(pool, x, M, steps);
  const GroupValues of_group(w);
  const auto fill = [&](int64_t n, int64_t s, uint8_t* to) {
    const int64_t k = s * kHalves;
    const Ints codes = Codes<Values>(w, n, k);
    Floats even = values(codes, 0), odd = values(codes, 1);
    if (w.zero) {
      const Neighbors zero = of_group(w.zero, n, k);
      even = Sub(even, zero.even), odd = Sub(odd, zero.odd);
    }
    if (w.scale) {
      const Neighbors scale = of_group(w.scales(), n, k);
      even = Mul(even, scale.even), odd = Mul(odd, scale.odd);
    }
    // Zeros of the activations make no zeros of NaN.
    const int64_t count = w.K - k;
    if (count < kHalves) {
      even = _mm512_maskz_mov_ps((1u << ((count + 1) / 2)) - 1, even);
      odd = _mm512_maskz_mov_ps((1u << (count / 2)) - 1, odd);
    }
    _mm512_store_si512(to, _mm512_or_si512(Rounded(even), _mm512_slli_epi32(Rounded(odd), 16)));
  };
  const Result result{out, w.N, Result::kFloat32};
  MultiplyTiles(pool, PlainTiles<float>{panels, result},
                CopiedTiles<decltype(fill)>{w.N, steps, fill}, w.N);
}

void TileLookup(ThreadPool& pool, const uint16_t* x, int64_t M, const Weights& w,
                const float* table, float* out) {
  TileFloats(pool, x, M, w, Lookup{Table(table)}, out);
}

void TileWiden(ThreadPool& pool, const uint16_t* x, int64_t M, const Weights& w, float* out) {
  TileFloats(pool, x, M, w, Widened{}, out);
}
