// Kernels for x86-64 processors with AVX2 and FMA.

#include "common.h"

#ifdef JAXQUANT_X86

#include <immintrin.h>

namespace jaxquant::avx2 {
namespace {

bool IsSupported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

BEGIN_TARGET("avx2,fma")

using Bytes = __m256i;
using Ints = __m256i;
using Floats = __m256;
constexpr int64_t kLanes = 8;
constexpr int kRows = 2, kTileColumns = 4;
constexpr int kOffset = 0;

inline Bytes LoadBytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Floats Load(const float* p) { return _mm256_loadu_ps(p); }
inline void Store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
inline Bytes Xor(Bytes a, int b) { return _mm256_xor_si256(a, _mm256_set1_epi8(b)); }
inline Bytes Low(Bytes both) { return _mm256_and_si256(both, _mm256_set1_epi8(15)); }
inline Bytes LowPlus8(Bytes both) { return Low(Xor(both, 0x88)); }
inline Bytes HighPlus8(Bytes both) { return LowPlus8(_mm256_srli_epi16(both, 4)); }
inline Ints DotHalf(__m128i w, __m128i x) {
  return _mm256_madd_epi16(_mm256_cvtepi8_epi16(w), _mm256_cvtepi8_epi16(x));
}
// VPMADDUBSW would saturate the sums of pairs in 16 bits: bytes are widened first.
inline Ints Dot(Ints acc, Bytes w, Bytes x) {
  acc = _mm256_add_epi32(acc, DotHalf(_mm256_castsi256_si128(w), _mm256_castsi256_si128(x)));
  return _mm256_add_epi32(
      acc, DotHalf(_mm256_extracti128_si256(w, 1), _mm256_extracti128_si256(x, 1)));
}
// Sums of the products of 4 neighbors.
inline Ints DotQuads(Ints acc, Bytes w, Bytes x) {
  Ints low = DotHalf(_mm256_castsi256_si128(w), _mm256_castsi256_si128(x));
  Ints high = DotHalf(_mm256_extracti128_si256(w, 1), _mm256_extracti128_si256(x, 1));
  return _mm256_add_epi32(acc, _mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), 0xd8));
}
// Sums of four products of a nibble and a byte fit into 16 bits.
inline Ints DotNibbles(Ints acc, Bytes even, Bytes odd, Bytes x, Bytes y) {
  Ints pairs = _mm256_add_epi16(_mm256_maddubs_epi16(even, x), _mm256_maddubs_epi16(odd, y));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline Ints LoadInts(const int32_t* p) { return LoadBytes(p); }
inline Ints ZeroInts() { return _mm256_setzero_si256(); }
inline Floats Broadcast(float x) { return _mm256_set1_ps(x); }
inline Floats ToFloats(Ints x) { return _mm256_cvtepi32_ps(x); }
inline Ints Add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Floats Add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats Sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats Mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats Max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats MulAdd(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats NegMulAdd(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
inline int32_t Sum(Ints x) {
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), x);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3] + lanes[4] + lanes[5] + lanes[6] + lanes[7];
}
inline float Sum(Floats x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
template <int C>
inline void Sums(const Floats (&x)[C], float* sums) {
  UNROLLED(c, C) sums[c] = Sum(x[c]);
}
inline Ints Widen(const int8_t* p) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline Ints LowNibbles(Ints x) { return _mm256_and_si256(x, _mm256_set1_epi32(15)); }
inline Ints HighNibbles(Ints x) { return _mm256_srli_epi32(x, 4); }
inline Ints NibblePairs(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
struct Table {
  Floats first, last;
  explicit Table(const float* p) : first(Load(p)), last(Load(p + 8)) {}
  Floats operator[](Ints codes) const {
    Floats is_last = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, codes),
                            _mm256_permutevar8x32_ps(last, codes), is_last);
  }
};
inline Floats Gather(const float* p, const int32_t* index, int count) {
  if (count == 1) return _mm256_broadcast_ss(p);
  __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  Floats found = _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes));
  return _mm256_permutevar8x32_ps(found, LoadBytes(index));
}
inline Bytes LoadPart(const void* p, int64_t bytes) {
  return LoadBytes(Padded<sizeof(Bytes)>(p, bytes).bytes);
}

#include "few_rows.h"
#include "panels_avx2.h"
#include "quantize_rows.h"
#include "power_blocks.h"
#include "update_blocks.h"
#include "attention.h"

// Rows from which rearranging the weights into panels pays.
constexpr int64_t kPanels = 12;

void DotInt8(ThreadPool& pool, const int8_t* x, int64_t M, const Weights& w, const Result& out) {
  if (M >= kPanels && w.K) PanelInt8(pool, x, M, w, out);
  else FewRowsInt8(pool, x, M, w, out);
}

void DotGroups(ThreadPool& pool, const int8_t* x, int64_t M, const Weights& w, const Result& out) {
  const bool has_panels = M >= kPanels && w.K;
  if (w.bits == 4) (has_panels ? PanelGroups<Quads> : FewRowsGroups<4>)(pool, x, M, w, out);
  else (has_panels ? PanelGroups<Pairs> : FewRowsGroups<8>)(pool, x, M, w, out);
}

END_TARGET

}  // namespace
}  // namespace jaxquant::avx2

const jaxquant::Kernels jaxquant::kAvx2 = {
    avx2::IsSupported, avx2::QuantizeRows<float>, avx2::QuantizeRows<uint16_t>,
    avx2::DotInt8,     avx2::DotGroups,           avx2::FewRowsLookup,
    avx2::FewRowsWiden, avx2::Attend,    avx2::UpdateBlocks};

#endif  // JAXQUANT_X86
