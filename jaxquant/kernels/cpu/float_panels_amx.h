// Products of many bfloat16 rows with AMX, by weights that are rounded to bfloat16. Included by avx512.cc
// within its namespace, after float_panels_avx512.h and panels_amx.h.

// Elements of a step.
constexpr int64_t kHalves = kStep / 2;

// Of neighboring elements: those of even index, or those of odd index.
struct Neighbors {
  Floats even, odd;
};

// Values of groups for the elements of steps.
struct GroupValues {
  const Weights& w;
  bool is_one = w.G == 1 || w.group() % kHalves == 0;  // for all elements of a step
  std::vector<int32_t> groups{};  // of each step, or of its even elements and then of its odd ones

  explicit GroupValues(const Weights& w) : w(w) {
    const auto add = [&](int64_t k) { groups.push_back(std::min(k / w.group(), w.G - 1)); };
    for (int64_t k = 0; k < w.K; k += kHalves) {
      if (is_one) add(k);
      else for (int64_t i = 0; i < kHalves; ++i) add(k + 2 * (i % kLanes) + i / kLanes);
    }
  }
  // Of row n at step s.
  Neighbors operator()(const float* values, int64_t n, int64_t s) const {
    const float* row = values + n * w.G;
    if (is_one) return {Broadcast(row[groups[s]]), Broadcast(row[groups[s]])};
    const int32_t* of_step = &groups[s * kHalves];
    return {_mm512_i32gather_ps(LoadInts(of_step), row, sizeof(float)),
            _mm512_i32gather_ps(LoadInts(of_step + kLanes), row, sizeof(float))};
  }
};

// Two codes of each lane, of one step.
template <typename Values>
inline Ints Codes(const Weights& w, int64_t n, int64_t k) {
  const int64_t bytes = std::min<int64_t>(kHalves, w.K - k) * Values::kBits / 8;
  const auto within = static_cast<__mmask32>((uint64_t{1} << bytes) - 1);
  const __m256i all = _mm256_maskz_loadu_epi8(within, w.at(n, k));
  if constexpr (Values::kBits == 8) return _mm512_cvtepu16_epi32(all);
  return _mm512_cvtepu8_epi32(_mm256_castsi256_si128(all));
}

// Pairs of bfloat16, rounded to nearest, ties to even.
inline Ints Halves(Floats even, Floats odd) {
#ifdef JAXQUANT_TILES
  return _mm512_or_si512(Rounded(even), _mm512_slli_epi32(Rounded(odd), 16));
#else
  Ints halves;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(halves) : "v"(odd), "v"(even));
  alignas(64) static const auto kInterleaved = [] {
    std::array<int16_t, 2 * kLanes> order;
    for (int i = 0; i < 2 * kLanes; ++i) order[i] = i / 2 + i % 2 * kLanes;
    return order;
  }();
  return _mm512_permutexvar_epi16(LoadBytes(kInterleaved.data()), halves);
#endif
}

template <typename Values>
void TileFloats(ThreadPool& pool, const uint16_t* x, int64_t M, const Weights& w,
                const Values& values, float* out) {
  const Steps steps({0, 2 * w.K});
  const Panels panels(pool, x, M, steps);
  const GroupValues of_group(w);
  const auto fill = [&](int64_t n, int64_t s, uint8_t* to) {
    const int64_t k = s * kHalves, count = w.K - k;
    const Ints codes = Codes<Values>(w, n, k);
    Floats even = values(codes, 0), odd = values(codes, 1);
    if (w.zero) {
      const Neighbors zero = of_group(w.zero, n, s);
      even = Sub(even, zero.even), odd = Sub(odd, zero.odd);
    }
    if (w.scale) {
      const Neighbors scale = of_group(w.scales(), n, s);
      even = Mul(even, scale.even), odd = Mul(odd, scale.odd);
    }
    // Zeros of the activations make no zeros of NaN.
    if (count < kHalves) {
      even = _mm512_maskz_mov_ps((1u << ((count + 1) / 2)) - 1, even);
      odd = _mm512_maskz_mov_ps((1u << (count / 2)) - 1, odd);
    }
    _mm512_store_si512(to, Halves(even, odd));
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
