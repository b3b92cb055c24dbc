// Kernels for ARM processors with NEON's dot products of bytes.

#include "common.h"

#ifdef JAXQUANT_ARM

#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

namespace jaxquant::neon {
namespace {

bool IsSupported() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & (1 << 20);  // ASIMDDP
#else
  return true;
#endif
}

#if defined(__clang__)
BEGIN_TARGET("dotprod")
#else
BEGIN_TARGET("arch=armv8.2-a+dotprod")
#endif

using Bytes = int8x16_t;
using Ints = int32x4_t;
using Floats = float32x4_t;
constexpr int64_t kLanes = 4;
constexpr int kRows = 4, kTileColumns = 4;
constexpr int kOffset = 0;

inline Bytes LoadBytes(const void* p) { return vld1q_s8(static_cast<const int8_t*>(p)); }
inline Floats Load(const float* p) { return vld1q_f32(p); }
inline void Store(float* p, Floats x) { vst1q_f32(p, x); }
inline Bytes Xor(Bytes a, int b) { return veorq_s8(a, vdupq_n_s8(static_cast<int8_t>(b))); }
inline Bytes LowPlus8(Bytes both) { return vandq_s8(Xor(both, 8), vdupq_n_s8(15)); }
inline Bytes HighPlus8(Bytes both) {
  return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(Xor(both, 0x80)), 4));
}
inline Ints Dot(Ints acc, Bytes w, Bytes x) { return vdotq_s32(acc, w, x); }
inline Ints DotQuads(Ints acc, Bytes w, Bytes x) { return Dot(acc, w, x); }
inline Ints DotNibbles(Ints acc, Bytes even, Bytes odd, Bytes x, Bytes y) {
  return Dot(Dot(acc, even, x), odd, y);
}
inline Ints LoadInts(const int32_t* p) { return vld1q_s32(p); }
inline Ints ZeroInts() { return vdupq_n_s32(0); }
inline Floats Broadcast(float x) { return vdupq_n_f32(x); }
inline Floats ToFloats(Ints x) { return vcvtq_f32_s32(x); }
inline Ints Add(Ints a, Ints b) { return vaddq_s32(a, b); }
inline Floats Add(Floats a, Floats b) { return vaddq_f32(a, b); }
inline Floats Sub(Floats a, Floats b) { return vsubq_f32(a, b); }
inline Floats Mul(Floats a, Floats b) { return vmulq_f32(a, b); }
inline Floats Max(Floats a, Floats b) { return vmaxq_f32(a, b); }
inline Floats MulAdd(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
inline Floats NegMulAdd(Floats a, Floats b, Floats c) { return vfmsq_f32(c, a, b); }
inline int32_t Sum(Ints x) { return vaddvq_s32(x); }
inline float Sum(Floats x) { return vaddvq_f32(x); }
template <int C>
inline void Sums(const Floats (&x)[C], float* sums) {
  UNROLLED(c, C) sums[c] = Sum(x[c]);
}
inline int8x8_t Four(const void* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return vreinterpret_s8_s32(vdup_n_s32(four));
}
inline Ints Widen(const int8_t* p) { return vmovl_s16(vget_low_s16(vmovl_s8(Four(p)))); }
inline Ints LowNibbles(Ints x) { return vandq_s32(x, vdupq_n_s32(15)); }
inline Ints HighNibbles(Ints x) { return vshrq_n_s32(x, 4); }
inline Ints NibblePairs(const uint8_t* p) {
  uint16x8_t wide = vmovl_u8(vreinterpret_u8_s8(Four(p)));
  return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide)));
}
struct Table {
  uint8x16x4_t values;
  explicit Table(const float* p) {
    for (int i = 0; i < 4; ++i) values.val[i] = vreinterpretq_u8_f32(vld1q_f32(p + 4 * i));
  }
  Floats operator[](Ints codes) const {
    // The four bytes that start at 4 * code.
    uint32x4_t bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100), vreinterpretq_u32_s32(codes), 0x04040404);
    return vreinterpretq_f32_u8(vqtbl4q_u8(values, vreinterpretq_u8_u32(bytes)));
  }
};
inline Floats Gather(const float* p, const int32_t* index, int) {
  return Floats{p[index[0]], p[index[1]], p[index[2]], p[index[3]]};
}
inline Bytes LoadPart(const void* p, int64_t bytes) {
  return LoadBytes(Padded<sizeof(Bytes)>(p, bytes).bytes);
}

#include "few_rows.h"
#include "quantize_rows.h"
#include "power_blocks.h"
#include "update_blocks.h"
#include "attention.h"

void DotGroups(ThreadPool& pool, const int8_t* x, int64_t M, const Weights& w, const Result& out) {
  (w.bits == 4 ? FewRowsGroups<4> : FewRowsGroups<8>)(pool, x, M, w, out);
}

END_TARGET

}  // namespace
}  // namespace jaxquant::neon

const jaxquant::Kernels jaxquant::kNeon = {
    neon::IsSupported, neon::QuantizeRows<float>, neon::QuantizeRows<uint16_t>,
    neon::FewRowsInt8, neon::DotGroups,           neon::FewRowsLookup,
    neon::FewRowsWiden, neon::Attend,    neon::UpdateBlocks};

#endif  // JAXQUANT_ARM
