// Kernels for x86-64 processors with AVX512-VNNI, and those for AMX, which such processors may have.

#include "common.h"

#ifdef JAXQUANT_X86
#ifdef JAXQUANT_AMX
#include "tiles.h"
#endif

// GCC 12's AVX512 intrinsics use variables that are uninitialized on purpose.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace jaxquant::avx512 {
namespace {

bool IsSupported() {
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

using Bytes = __m512i;
using Ints = __m512i;
using Floats = __m512;
constexpr int64_t kLanes = 16;
// Rows and columns of a tile for few rows: as many accumulators as registers hold.
constexpr int kRows = 4, kTileColumns = 4;
// VPDPBUSD multiplies unsigned by signed bytes: this offset makes weights unsigned for Dot, and
// offset * sum(activations) is subtracted once per row.
constexpr int kOffset = 128;

inline Bytes LoadBytes(const void* p) { return _mm512_loadu_si512(p); }
inline Floats Load(const float* p) { return _mm512_loadu_ps(p); }
inline void Store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Bytes Xor(Bytes a, int b) { return _mm512_xor_si512(a, _mm512_set1_epi8(b)); }
inline Bytes Low(Bytes both) { return _mm512_and_si512(both, _mm512_set1_epi8(15)); }
// Signed nibbles plus 8: (both ^ 0x88) & 15, in one instruction.
inline Bytes LowPlus8(Bytes both) {
  return _mm512_ternarylogic_epi32(both, _mm512_set1_epi8(-0x78), _mm512_set1_epi8(15), 0x28);
}
inline Bytes HighPlus8(Bytes both) { return LowPlus8(_mm512_srli_epi16(both, 4)); }
// acc + weights (plus kOffset) * activations, summed over the 4 bytes of each lane.
inline Ints Dot(Ints acc, Bytes w, Bytes x) { return _mm512_dpbusd_epi32(acc, w, x); }
// The same for neighbors, which NEON and AVX2 sum by other instructions.
inline Ints DotQuads(Ints acc, Bytes w, Bytes x) { return Dot(acc, w, x); }
inline Ints DotNibbles(Ints acc, Bytes even, Bytes odd, Bytes x, Bytes y) {
  return Dot(Dot(acc, even, x), odd, y);
}
inline Ints LoadInts(const int32_t* p) { return _mm512_loadu_si512(p); }
inline Ints ZeroInts() { return _mm512_setzero_si512(); }
inline Floats Broadcast(float x) { return _mm512_set1_ps(x); }
inline Floats ToFloats(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Ints Add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Floats Add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats Sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats Mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats Max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats MulAdd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats NegMulAdd(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
inline int32_t Sum(Ints x) { return _mm512_reduce_add_epi32(x); }
inline float Sum(Floats x) { return _mm512_reduce_add_ps(x); }
// The sums of some vectors; those of four as if of one after another, in a third of the instructions.
template <int C>
inline void Sums(const Floats (&x)[C], float* sums) {
  if constexpr (C == 4) {
    const Floats ab = _mm512_add_ps(_mm512_shuffle_f32x4(x[0], x[1], 0x44),
                                    _mm512_shuffle_f32x4(x[0], x[1], 0xee));
    const Floats cd = _mm512_add_ps(_mm512_shuffle_f32x4(x[2], x[3], 0x44),
                                    _mm512_shuffle_f32x4(x[2], x[3], 0xee));
    Floats all = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88),
                               _mm512_shuffle_f32x4(ab, cd, 0xdd));
    all = _mm512_add_ps(all, _mm512_permute_ps(all, 0x4e));
    all = _mm512_add_ps(all, _mm512_permute_ps(all, 0xb1));
    const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm_storeu_ps(sums, _mm512_castps512_ps128(_mm512_permutexvar_ps(lanes, all)));
  } else {
    UNROLLED(c, C) sums[c] = Sum(x[c]);
  }
}
inline Ints Widen(const int8_t* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Ints LowNibbles(Ints x) { return x; }  // Table ignores the other bits.
inline Ints HighNibbles(Ints x) { return _mm512_srli_epi32(x, 4); }
inline Ints NibblePairs(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
struct Table {
  Floats values;
  explicit Table(const float* p) : values(Load(p)) {}
  Floats operator[](Ints codes) const { return _mm512_permutexvar_ps(codes, values); }
};
// Reads `count` values and returns, in each lane, the one at its index.
inline Floats Gather(const float* p, const int32_t* index, int count) {
  if (count == 1) return _mm512_set1_ps(*p);
  const __m512i lanes = _mm512_load_si512(index);
  // Two and four are permuted within 128 bits, which takes fewer cycles.
  if (count == 4) return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(p)), lanes);
  if (count == 2)
    return _mm512_permutevar_ps(_mm512_broadcast_f32x2(_mm_castsi128_ps(_mm_loadu_si64(p))), lanes);
  Floats found = _mm512_maskz_loadu_ps((2u << (count - 1)) - 1, p);
  return _mm512_permutexvar_ps(lanes, found);
}
// A vector of the first bytes, then zeros. With a copy instead of a mask, a product of 8 rows by
// 1000 x 1003 took twice as long.
inline Bytes LoadPart(const void* p, int64_t bytes) {
  return _mm512_maskz_loadu_epi8((uint64_t{1} << bytes) - 1, p);
}

#include "few_rows.h"
#include "panels_avx512.h"
#include "float_panels_avx512.h"
#include "quantize_rows.h"
#include "power_blocks.h"
#include "update_blocks.h"
#include "attention.h"

// Rows from which rearranging the weights into panels pays.
constexpr int64_t kInt8Panels = 16, kGroupPanels = 8, kLookupPanels = 10, kWidenPanels = 16;

void DotInt8(ThreadPool& pool, const int8_t* x, int64_t M, const Weights& w, const Result& out) {
  if (M >= kInt8Panels && w.K) PanelInt8(pool, x, M, w, out);
  else FewRowsInt8(pool, x, M, w, out);
}

void DotGroups(ThreadPool& pool, const int8_t* x, int64_t M, const Weights& w, const Result& out) {
  if (M >= kGroupPanels && w.K) PanelGroups(pool, x, M, w, out);
  else (w.bits == 4 ? FewRowsGroups<4> : FewRowsGroups<8>)(pool, x, M, w, out);
}

void DotLookup(ThreadPool& pool, const float* x, int64_t M, const Weights& w, const float* table,
               float* out) {
  if (M >= kLookupPanels && w.K)
    PanelFloat(pool, x, M, w, Lookup{Table(table)}, out);
  else FewRowsLookup(pool, x, M, w, table, out);
}

void DotWiden(ThreadPool& pool, const float* x, int64_t M, const Weights& w, float* out) {
  if (M >= kWidenPanels && w.K) PanelFloat(pool, x, M, w, Widened{}, out);
  else FewRowsWiden(pool, x, M, w, out);
}

#ifdef JAXQUANT_AMX
#include "panels_amx.h"
#include "float_panels_amx.h"

bool HasTiles() { return IsSupported() && Tiles::IsSupported(); }
#endif

END_TARGET

}  // namespace
}  // namespace jaxquant::avx512

const jaxquant::Kernels jaxquant::kAvx512 = {
    avx512::IsSupported, avx512::QuantizeRows<float>, avx512::QuantizeRows<uint16_t>,
    avx512::DotInt8,     avx512::DotGroups,           avx512::DotLookup,
    avx512::DotWiden,    avx512::Attend,              avx512::UpdateBlocks};

#ifdef JAXQUANT_AMX
const jaxquant::Kernels jaxquant::kAmx = {
    avx512::HasTiles, avx512::QuantizeRows<float>, avx512::QuantizeRows<uint16_t>,
    avx512::TileInt8, avx512::TileGroups,          avx512::DotLookup,
    avx512::DotWiden, avx512::Attend,              avx512::UpdateBlocks,
    avx512::TileLookup, avx512::TileWiden};
#endif

#endif  // JAXQUANT_X86
