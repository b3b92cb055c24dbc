// Products with quantized weights for CPUs, called through XLA's FFI.
//
// Inputs are rows (M, K) and weights rows (N, K): the contracted axis is last in both.
//
// Few rows: a vector holds elements of one row of weights, each of its lanes sums up some of them,
// and lanes are added at the very end. So weights are read once, as they lie in memory, 4-bit ones
// two to a byte. Many rows: the weights of 64 columns are rearranged in the cache, once for all
// rows, into vectors that hold one column per lane ("panels").
//
// The file includes itself once per set of instructions, each in a namespace of its own; the best
// that the processor has is chosen when a product is called. In order: what all share, vectors of
// each set, kernels for few rows and for many, products, handlers.
//
// VPDPBUSD and VPMADDUBSW multiply unsigned by signed bytes. Weights are made unsigned by an offset
// (128, or 8 for nibbles), which leaves offset * sum(inputs) to be taken off: once per row.

#ifndef INSTRUCTIONS

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Inputs that stay in the L2 cache while rows of weights pass by, in bytes.
constexpr int64_t kInputsInCache = 1 << 18;
// Rows of weights that stay in the L1 cache while blocks of inputs pass by.
constexpr int64_t kColumns = 64;
// Elements that a thread quantizes at least: in 20 microseconds, when another may take 40 to wake.
constexpr int64_t kQuantizedAtOnce = 1 << 17;
// Asks early for the weights of columns to come, so many steps ahead: by itself a core has too few
// reads under way to use the memory's bandwidth.
constexpr int64_t kAhead = 4;
// The same where one row is read after another, in bytes. Asked for in L2, 8-bit codes of 4096 x 4096
// by one row arrive at 96 % of the bandwidth of a sum; in L1 at 79 %, and without asking at 80 %.
constexpr int64_t kAheadInRow = 4096;
// Bytes that a thread copies at least.
constexpr int64_t kLeastCopy = 1 << 17;

// What threads share that work on one product.
struct Pieces {
  std::function<void(int64_t, int64_t)> work;
  int64_t count, least, multiple, threads;
  std::atomic<int64_t> next{0}, done{0};
  std::mutex mutex;
  std::condition_variable all_done;

  // Where the piece from `begin` on ends. Pieces become smaller, so that all end at one time: the
  // cores of one machine are rarely equally fast.
  int64_t End(int64_t begin) const {
    int64_t size = std::max(least, (count - begin) / (threads * 4));
    return std::min(begin + (size + multiple - 1) / multiple * multiple, count);
  }

  // Takes pieces until none is left. A thread that comes late finds none, and touches nothing.
  void Run() {
    for (int64_t begin = next.load(); begin < count;) {
      int64_t end = End(begin);
      if (!next.compare_exchange_weak(begin, end)) continue;
      work(begin, end);
      if (done.fetch_add(end - begin) + end - begin == count) {
        std::lock_guard<std::mutex> lock(mutex);
        all_done.notify_one();
      }
      begin = next.load();
    }
  }

  // Looks for a while before it sleeps: to be woken takes longer than most pieces.
  void Wait() {
    using Clock = std::chrono::steady_clock;
    for (auto until = Clock::now() + std::chrono::microseconds(100); Clock::now() < until;)
      if (done.load() == count) return;
    std::unique_lock<std::mutex> lock(mutex);
    all_done.wait(lock, [&] { return done.load() == count; });
  }
};

// Runs work(begin, end) over [0, count) on the threads of the pool and on this one, and waits for
// pieces that were begun, not for threads that were asked: all of them may wait in calls like this.
void Parallel(ffi::ThreadPool& pool, int64_t count, int64_t least, int64_t multiple,
              std::function<void(int64_t, int64_t)> work) {
  int64_t threads = std::min(pool.num_threads(), std::max<int64_t>(1, count / least));
  if (threads <= 1) return work(0, count);
  auto pieces = std::make_shared<Pieces>();
  pieces->work = std::move(work);
  pieces->count = count, pieces->least = least;
  pieces->multiple = multiple, pieces->threads = threads;
  for (int64_t i = 0; i + 1 < threads; ++i) pool.Schedule([pieces] { pieces->Run(); });
  pieces->Run();
  pieces->Wait();
}

// Rows of inputs in the order in which nibbles lie: in each block the even ones, then the odd.
template <typename T>
std::vector<T> EvensThenOdds(const T* x, int64_t size, int64_t block) {
  std::vector<T> arranged(size);
  for (int64_t b = 0; b < size; b += block)
    for (int64_t i = 0; i < block / 2; ++i) {
      arranged[b + i] = x[b + 2 * i];
      arranged[b + block / 2 + i] = x[b + 2 * i + 1];
    }
  return arranged;
}

// A sum of codes, exact. Not of floats, whose order of addition the compiler must keep.
inline int32_t SumOf(const int8_t* x, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += x[i];
  return sum;
}

// Sums of `width` codes each.
template <typename Sum>
std::vector<Sum> SumsOf(const int8_t* x, int64_t count, int64_t width) {
  std::vector<Sum> sums(count);
  for (int64_t i = 0; i < count; ++i) sums[i] = SumOf(x + i * width, width);
  return sums;
}

// Asks for weights before they are needed, in the L1 cache or in L2.
inline void Prefetch(const void* weights) { __builtin_prefetch(weights, 0, 3); }
inline void PrefetchFar(const void* weights) { __builtin_prefetch(weights, 0, 2); }

// Weights (N, K) as they are stored, of 4 bits the low nibble first, with scales and zero points
// (N, G) for groups of K / G elements of a row. A scale of null is 1, a zero point of null is 0.
struct Weights {
  const uint8_t* codes;
  int64_t N, K;
  int bits;
  const float *scale = nullptr, *zero = nullptr;
  int64_t G = 1;

  int64_t group() const { return std::max<int64_t>(1, K / G); }
  const uint8_t* at(int64_t n, int64_t k) const { return codes + (n * K + k) * bits / 8; }
  int64_t bytes() const { return std::max<int64_t>(1, K * bits / 8); }
};

// The bits of a float as bfloat16, rounded to nearest, ties to even; NaN stays NaN.
inline uint16_t ToBFloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 0x40;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Where sums go: int32 as they are, or floats times the scales of their row and column, in this
// order. A scale of null is 1.
struct Result {
  enum Type { kInt32, kFloat32, kBFloat16 };
  void* out;  // (M, N)
  int64_t N;
  Type type;
  const float *row = nullptr, *column = nullptr;

  void Put(int64_t m, int64_t n, float sum) const {
    if (row) sum *= row[m];
    if (column) sum *= column[n];
    if (type == kFloat32) static_cast<float*>(out)[m * N + n] = sum;
    else static_cast<uint16_t*>(out)[m * N + n] = ToBFloat16(sum);
  }
  void Put(int64_t m, int64_t n, int32_t sum) const {
    if (type == kInt32) static_cast<int32_t*>(out)[m * N + n] = sum;
    else Put(m, n, static_cast<float>(sum));
  }
};

// Memory that a thread keeps for its next piece of work, on whole lines of the cache.
struct alignas(64) Line {
  uint8_t bytes[64];
};
template <typename T>
T* Scratch(int which, int64_t count) {
  static thread_local std::vector<Line> kept[3];
  kept[which].resize(std::max<size_t>(kept[which].size(), (count * sizeof(T) + 63) / 64));
  return reinterpret_cast<T*>(kept[which].data());
}

}  // namespace

// A loop over registers. GCC keeps arrays of vectors in memory unless such loops are unrolled first.
#define EACH(i, count) _Pragma("GCC unroll 16") for (int i = 0; i < count; ++i)
// A function by itself, for which the compiler finds registers without regard to its callers.
#define APART __attribute__((noinline))
#if defined(__clang__)
#define PRAGMA(text) _Pragma(#text)
#define BEGIN(set) PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define END _Pragma("clang attribute pop")
#else
#define PRAGMA(text) _Pragma(#text)
#define BEGIN(set) _Pragma("GCC push_options") PRAGMA(GCC target(set))
#define END _Pragma("GCC pop_options")
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#define INSTRUCTIONS avx512
#define IS_AVX512
#include "cpu.cc"
#undef IS_AVX512
#undef INSTRUCTIONS
END
BEGIN("avx2,fma")
#define INSTRUCTIONS avx2
#define IS_AVX2
#include "cpu.cc"
#undef IS_AVX2
#undef INSTRUCTIONS
END
#define CALL(set, call) ((set) == 0 ? avx512::call : avx2::call)
#elif defined(__aarch64__) && defined(__GNUC__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__clang__)
BEGIN("dotprod")
#else
BEGIN("arch=armv8.2-a+dotprod")
#endif
#define INSTRUCTIONS neon
#define IS_NEON
#include "cpu.cc"
#undef IS_NEON
#undef INSTRUCTIONS
END
#define CALL(set, call) neon::call
#endif

// Whether the processor has a set of instructions: 0 AVX512-VNNI, 1 AVX2, 2 NEON.
extern "C" int jaxquant_has(int set) {
#if defined(__x86_64__) && defined(__GNUC__)
  bool avx512 = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return set == 0 ? avx512 : set == 1 && avx2;
#elif defined(__aarch64__) && defined(__linux__)
  return set == 2 && (getauxval(AT_HWCAP) & (1 << 20));  // ASIMDDP
#elif defined(__aarch64__) && defined(__GNUC__)
  return set == 2;
#else
  return 0;
#endif
}

#ifdef CALL
namespace {

template <ffi::DataType T>
using In = ffi::Buffer<T>;
template <ffi::DataType T>
using Out = ffi::ResultBuffer<T>;

const float* OrNull(const In<ffi::F32>& values) {
  return values.element_count() ? values.typed_data() : nullptr;
}

Weights Int4(const ffi::AnyBuffer& w, int64_t K, const In<ffi::F32>& scale,
             const In<ffi::F32>& zero) {
  return {static_cast<const uint8_t*>(w.untyped_data()), scale.dimensions()[0], K, 4,
          scale.typed_data(), OrNull(zero), std::max<int64_t>(1, scale.dimensions()[1])};
}

Weights Int8(const In<ffi::S8>& w) {
  return {reinterpret_cast<const uint8_t*>(w.typed_data()), w.dimensions()[0], w.dimensions()[1], 8};
}

Result To(ffi::Result<ffi::AnyBuffer>& out, const In<ffi::F32>& row, const float* column) {
  Result::Type type = out->element_type() == ffi::S32   ? Result::kInt32
                      : out->element_type() == ffi::F32 ? Result::kFloat32
                                                        : Result::kBFloat16;
  return {out->untyped_data(), out->dimensions()[1], type, OrNull(row), column};
}

ffi::Error QuantizeRows(ffi::ThreadPool pool, int64_t set, int64_t qmin, int64_t qmax,
                        ffi::AnyBuffer x, Out<ffi::S8> codes, Out<ffi::F32> scale) {
  const int64_t K = x.dimensions().back(), M = scale->element_count();
  int8_t* to = codes->typed_data();
  float* scales = scale->typed_data();
  if (x.element_type() == ffi::F32)
    CALL(set, QuantizeRows(pool, x.typed_data<float>(), M, K, qmin, qmax, to, scales));
  else
    CALL(set, QuantizeRows(pool, static_cast<const uint16_t*>(x.untyped_data()), M, K, qmin, qmax,
                           to, scales));
  return ffi::Error::Success();
}

ffi::Error DotInt8(ffi::ThreadPool pool, int64_t set, In<ffi::S8> x, In<ffi::S8> w,
                   In<ffi::F32> row, In<ffi::F32> column, ffi::Result<ffi::AnyBuffer> out) {
  CALL(set, DotInt8(pool, x.typed_data(), x.dimensions()[0], Int8(w), To(out, row, OrNull(column))));
  return ffi::Error::Success();
}

ffi::Error DotInt4(ffi::ThreadPool pool, int64_t set, In<ffi::S8> x, ffi::AnyBuffer w,
                   In<ffi::F32> scale, In<ffi::F32> zero, In<ffi::F32> row,
                   ffi::Result<ffi::AnyBuffer> out) {
  int64_t M = x.dimensions()[0], K = x.dimensions()[1];
  CALL(set, DotInt4(pool, x.typed_data(), M, Int4(w, K, scale, zero), To(out, row, nullptr)));
  return ffi::Error::Success();
}

ffi::Error DotLookup(ffi::ThreadPool pool, int64_t set, In<ffi::F32> x, ffi::AnyBuffer w,
                     In<ffi::F32> scale, In<ffi::F32> zero, In<ffi::F32> table,
                     Out<ffi::F32> out) {
  int64_t M = x.dimensions()[0], K = x.dimensions()[1];
  CALL(set, DotLookup(pool, x.typed_data(), M, Int4(w, K, scale, zero), table.typed_data(),
                      out->typed_data()));
  return ffi::Error::Success();
}

ffi::Error DotWiden(ffi::ThreadPool pool, int64_t set, In<ffi::F32> x, In<ffi::S8> w,
                    Out<ffi::F32> out) {
  CALL(set, DotWiden(pool, x.typed_data(), x.dimensions()[0], Int8(w), out->typed_data()));
  return ffi::Error::Success();
}

// One of `count` arrays that lie side by side along an axis, in each of `outer` places before it.
// XLA moves elements of less than a byte one at a time where it slices.
ffi::Error Slice(ffi::ThreadPool pool, int64_t outer, int64_t count, int64_t bytes,
                 ffi::AnyBuffer stack, In<ffi::S32> index, ffi::Result<ffi::AnyBuffer> out) {
  const auto* from = static_cast<const uint8_t*>(stack.untyped_data());
  auto* to = static_cast<uint8_t*>(out->untyped_data());
  int64_t at = index.typed_data()[0];
  at = std::clamp<int64_t>(at < 0 ? at + count : at, 0, count - 1);
  for (int64_t i = 0; i < outer; ++i)
    Parallel(pool, bytes, kLeastCopy, 64, [=](int64_t begin, int64_t end) {
      std::memcpy(to + i * bytes + begin, from + (i * count + at) * bytes + begin, end - begin);
    });
  return ffi::Error::Success();
}

}  // namespace

#define HANDLER(name, function, binding)                                    \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                            \
      name, function,                                                       \
      ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("set") binding)
#define ARG(T) .Arg<In<ffi::T>>()
#define RET(T) .Ret<ffi::Buffer<ffi::T>>()

HANDLER(jaxquant_quantize_rows, QuantizeRows,
        .Attr<int64_t>("qmin").Attr<int64_t>("qmax").Arg<ffi::AnyBuffer>() RET(S8) RET(F32));
HANDLER(jaxquant_dot_int8, DotInt8,
        ARG(S8) ARG(S8) ARG(F32) ARG(F32).Ret<ffi::AnyBuffer>());
HANDLER(jaxquant_dot_int4, DotInt4,
        ARG(S8).Arg<ffi::AnyBuffer>() ARG(F32) ARG(F32) ARG(F32).Ret<ffi::AnyBuffer>());
HANDLER(jaxquant_dot_lookup, DotLookup,
        ARG(F32).Arg<ffi::AnyBuffer>() ARG(F32) ARG(F32) ARG(F32) RET(F32));
HANDLER(jaxquant_dot_widen, DotWiden, ARG(F32) ARG(S8) RET(F32));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_slice, Slice,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("outer")
                                  .Attr<int64_t>("count")
                                  .Attr<int64_t>("bytes")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<In<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());
#endif

#else  // One set of instructions.

namespace {
namespace INSTRUCTIONS {

#ifdef IS_AVX512
using Bytes = __m512i;
using Ints = __m512i;
using Floats = __m512;
constexpr int64_t kLanes = 16;
// Accumulators of a tile for few rows: as many as registers hold.
constexpr int kRows = 4, kWide = 4;
// What makes weights unsigned for Dot.
constexpr int kOffset = 128;

inline Bytes LoadBytes(const void* p) { return _mm512_loadu_si512(p); }
inline Floats Load(const float* p) { return _mm512_loadu_ps(p); }
inline Bytes Xor(Bytes a, int b) { return _mm512_xor_si512(a, _mm512_set1_epi8(b)); }
inline Bytes Low(Bytes both) { return _mm512_and_si512(both, _mm512_set1_epi8(15)); }
inline Bytes High(Bytes both) { return Low(_mm512_srli_epi16(both, 4)); }
// acc + weights (with their offset) * inputs, summed over the bytes of each lane.
inline Ints Dot(Ints acc, Bytes w, Bytes x) { return _mm512_dpbusd_epi32(acc, w, x); }
// The same for two vectors of nibbles.
inline Ints DotNibbles(Bytes even, Bytes odd, Bytes x, Bytes y) {
  return Dot(Dot(_mm512_setzero_si512(), even, x), odd, y);
}
inline Ints NoInts() { return _mm512_setzero_si512(); }
inline Floats All(float x) { return _mm512_set1_ps(x); }
inline Floats ToFloats(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Ints Add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Floats Add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats Sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats Mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats MulAdd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats MulSub(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
inline int32_t Sum(Ints x) { return _mm512_reduce_add_epi32(x); }
inline float Sum(Floats x) { return _mm512_reduce_add_ps(x); }
inline Ints Widen(const int8_t* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Ints LowNibbles(Ints x) { return x; }  // Lookup ignores the bits above.
inline Ints HighNibbles(Ints x) { return _mm512_srli_epi32(x, 4); }
inline Ints NibblePairs(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
struct Table {
  Floats values;
  explicit Table(const float* p) : values(Load(p)) {}
  Floats operator[](Ints codes) const { return _mm512_permutexvar_ps(codes, values); }
};
// Reads `count` values, and gives each lane the one of its index.
inline Floats Gather(const float* p, const int32_t* index, int count) {
  if (count == 1) return _mm512_set1_ps(*p);
  Floats found = _mm512_maskz_loadu_ps((2u << (count - 1)) - 1, p);
  return _mm512_permutexvar_ps(_mm512_load_si512(index), found);
}
#endif

#ifdef IS_AVX2
using Bytes = __m256i;
using Ints = __m256i;
using Floats = __m256;
constexpr int64_t kLanes = 8;
constexpr int kRows = 2, kWide = 4;
constexpr int kOffset = 0;

inline Bytes LoadBytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Floats Load(const float* p) { return _mm256_loadu_ps(p); }
inline Bytes Xor(Bytes a, int b) { return _mm256_xor_si256(a, _mm256_set1_epi8(b)); }
inline Bytes Low(Bytes both) { return _mm256_and_si256(both, _mm256_set1_epi8(15)); }
inline Bytes High(Bytes both) { return Low(_mm256_srli_epi16(both, 4)); }
inline Ints DotHalf(__m128i w, __m128i x) {
  return _mm256_madd_epi16(_mm256_cvtepi8_epi16(w), _mm256_cvtepi8_epi16(x));
}
// Sums of pairs in 16 bits would saturate: they are widened first.
inline Ints Dot(Ints acc, Bytes w, Bytes x) {
  acc = _mm256_add_epi32(acc, DotHalf(_mm256_castsi256_si128(w), _mm256_castsi256_si128(x)));
  return _mm256_add_epi32(
      acc, DotHalf(_mm256_extracti128_si256(w, 1), _mm256_extracti128_si256(x, 1)));
}
// Sums of four products of a nibble and a byte fit into 16 bits.
inline Ints DotNibbles(Bytes even, Bytes odd, Bytes x, Bytes y) {
  Ints pairs = _mm256_add_epi16(_mm256_maddubs_epi16(even, x), _mm256_maddubs_epi16(odd, y));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
inline Ints NoInts() { return _mm256_setzero_si256(); }
inline Floats All(float x) { return _mm256_set1_ps(x); }
inline Floats ToFloats(Ints x) { return _mm256_cvtepi32_ps(x); }
inline Ints Add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Floats Add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats Sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats Mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats MulAdd(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats MulSub(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
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
#endif

#ifdef IS_NEON
using Bytes = int8x16_t;
using Ints = int32x4_t;
using Floats = float32x4_t;
constexpr int64_t kLanes = 4;
constexpr int kRows = 4, kWide = 4;
constexpr int kOffset = 0;

inline Bytes LoadBytes(const void* p) { return vld1q_s8(static_cast<const int8_t*>(p)); }
inline Floats Load(const float* p) { return vld1q_f32(p); }
inline Bytes Xor(Bytes a, int b) { return veorq_s8(a, vdupq_n_s8(static_cast<int8_t>(b))); }
inline Bytes Low(Bytes both) { return vandq_s8(both, vdupq_n_s8(15)); }
inline Bytes High(Bytes both) {
  return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(both), 4));
}
inline Ints Dot(Ints acc, Bytes w, Bytes x) { return vdotq_s32(acc, w, x); }
inline Ints DotNibbles(Bytes even, Bytes odd, Bytes x, Bytes y) {
  return Dot(Dot(vdupq_n_s32(0), even, x), odd, y);
}
inline Ints NoInts() { return vdupq_n_s32(0); }
inline Floats All(float x) { return vdupq_n_f32(x); }
inline Floats ToFloats(Ints x) { return vcvtq_f32_s32(x); }
inline Ints Add(Ints a, Ints b) { return vaddq_s32(a, b); }
inline Floats Add(Floats a, Floats b) { return vaddq_f32(a, b); }
inline Floats Sub(Floats a, Floats b) { return vsubq_f32(a, b); }
inline Floats Mul(Floats a, Floats b) { return vmulq_f32(a, b); }
inline Floats MulAdd(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
inline Floats MulSub(Floats a, Floats b, Floats c) { return vfmsq_f32(c, a, b); }
inline int32_t Sum(Ints x) { return vaddvq_s32(x); }
inline float Sum(Floats x) { return vaddvq_f32(x); }
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
    // Four bytes from 4 * code on.
    uint32x4_t bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100), vreinterpretq_u32_s32(codes), 0x04040404);
    return vreinterpretq_f32_u8(vqtbl4q_u8(values, vreinterpretq_u8_u32(bytes)));
  }
};
inline Floats Gather(const float* p, const int32_t* index, int) {
  return Floats{p[index[0]], p[index[1]], p[index[2]], p[index[3]]};
}
#endif

constexpr int64_t kBytes = sizeof(Bytes);
// Sums that one row of weights is added up in.
constexpr int kAlong = 4;
// Elements of a 4-bit weight that one vector holds.
constexpr int64_t kBlock = 2 * kBytes;

// A vector of the first bytes, and zeros. By a copy, a product of 8 rows by 1000 x 1003 took twice as
// long.
inline Bytes LoadPart(const void* p, int64_t bytes) {
#ifdef IS_AVX512
  return _mm512_maskz_loadu_epi8((uint64_t{1} << bytes) - 1, p);
#else
  alignas(64) uint8_t buffer[kBytes] = {};
  std::memcpy(buffer, p, bytes);
  return LoadBytes(buffer);
#endif
}

// Scales of lanes of which each holds so many elements of a block: lane l of group
// (first + l * elements) / group, counted from the group where the block begins.
struct OfLanes {
  alignas(64) int32_t index[kLanes];
  int count;
  uint64_t inverse;  // 2^64 / group, rounded up

  OfLanes(int64_t first, int64_t elements, int64_t group) {
    for (int64_t l = 0; l < kLanes; ++l) index[l] = (first + l * elements) / group;
    count = index[kLanes - 1] + 1;
    inverse = group == 1 ? 0 : ~uint64_t{0} / group + 1;
  }
  Floats operator()(const float* from) const { return Gather(from, index, count); }
  // k / group, of more than one element each, without a division: it takes as long as a block.
  int64_t GroupOf(int64_t k) const {
    return static_cast<unsigned __int128>(k) * inverse >> 64;
  }
};

// Adds up a row of K elements by blocks: add(sum, k) gives sum and the block from k on. Several
// sums, so that no addition waits for the one before.
template <typename Sum, typename AddBlock>
inline Sum Along(int64_t K, int64_t block, Sum none, const AddBlock& add) {
  Sum sum[kAlong];
  EACH(i, kAlong) sum[i] = none;
  int64_t k = 0;
  for (; k + kAlong * block <= K; k += kAlong * block)
    EACH(i, kAlong) sum[i] = add(sum[i], k + i * block);
  for (; k + block <= K; k += block) sum[0] = add(sum[0], k);
  return Add(Add(sum[0], sum[1]), Add(sum[2], sum[3]));
}

// Calls kernel.Tile<rows, columns>(m, n), or kernel.One(m, n) where there is one row of inputs: then
// weights are read in the order in which they lie, as fast as one core can.
template <int R, typename Kernel>
inline void Columns(const Kernel& kernel, int64_t m, int64_t n, int64_t end) {
  if constexpr (R == 1) {
    for (; n < end; ++n) kernel.One(m, n);
    return;
  }
  for (; n + kWide <= end; n += kWide) kernel.template Tile<R, kWide>(m, n);
  for (; n < end; ++n) kernel.template Tile<R, 1>(m, n);
}

// Runs a kernel over all columns, in blocks of rows that stay in the cache.
template <typename Kernel>
void ForTiles(ffi::ThreadPool& pool, int64_t M, const Weights& w, int64_t input_bytes,
              const Kernel& kernel) {
  int64_t rows = kInputsInCache / std::max<int64_t>(1, input_bytes) / kRows * kRows;
  rows = std::max<int64_t>(kRows, rows);
  int64_t least = std::max<int64_t>(16, (1 << 16) / w.bytes());
  Parallel(pool, w.N, least, kWide, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n += kColumns)
      for (int64_t m0 = 0; m0 < M; m0 += rows) {
        int64_t end = std::min(n + kColumns, last), m1 = std::min(m0 + rows, M), m = m0;
        for (; m + kRows <= m1; m += kRows) Columns<kRows>(kernel, m, n, end);
        if constexpr (kRows > 3) {
          if (m1 - m == 3) Columns<3>(kernel, m, n, end);
          if (m1 - m == 2) Columns<2>(kernel, m, n, end);
        }
        if (m1 - m == 1) Columns<1>(kernel, m, n, end);
      }
  });
}

// 8-bit inputs, 8-bit weights: sums of codes, exact.
struct Int8ByInt8 {
  const int8_t* x;
  const int32_t* sums;  // (M,): of the inputs of each row
  Weights w;
  Result out;

  // Adds the products of a vector of weights, or of part of one.
  static Ints AddTo(Ints sum, Bytes weights, Bytes inputs) {
    return Dot(sum, Xor(weights, kOffset), inputs);
  }

  // The sum with its offset may leave 32 bits, and comes back.
  void Put(int64_t m, int64_t n, Ints sum) const {
    const int64_t rest = w.K % kBytes, from = w.K - rest;
    if (rest)
      sum = AddTo(sum, LoadPart(w.at(n, from), rest), LoadPart(x + m * w.K + from, rest));
    uint32_t offset = static_cast<uint32_t>(kOffset) * static_cast<uint32_t>(sums[m]);
    out.Put(m, n, static_cast<int32_t>(static_cast<uint32_t>(Sum(sum)) - offset));
  }

  APART void One(int64_t m, int64_t n) const {
    const uint8_t* weights = w.at(n, 0);
    const int8_t* inputs = x + m * w.K;
    Put(m, n, Along(w.K, kBytes, NoInts(), [=](Ints sum, int64_t k) {
          PrefetchFar(weights + k + kAheadInRow);
          return AddTo(sum, LoadBytes(weights + k), LoadBytes(inputs + k));
        }));
  }

  // Sums over whole vectors.
  template <int R, int C>
  APART void AddVectors(Ints (&sum)[R][C], int64_t m, int64_t n) const {
    const int64_t K = w.K;
    const uint8_t* rows = w.at(n, 0);
    Ints acc[R][C];
    EACH(r, R)
      EACH(c, C) acc[r][c] = NoInts();
    for (int64_t k = 0; k + kBytes <= K; k += kBytes)
      EACH(c, C) {
        const uint8_t* from = rows + c * K + k;
        PrefetchFar(from + kAhead * C * K);
        Bytes weights = Xor(LoadBytes(from), kOffset);
        EACH(r, R) acc[r][c] = Dot(acc[r][c], weights, LoadBytes(x + (m + r) * K + k));
      }
    EACH(r, R)
      EACH(c, C) sum[r][c] = acc[r][c];
  }

  template <int R, int C>
  void Tile(int64_t m, int64_t n) const {
    Ints acc[R][C];
    AddVectors<R, C>(acc, m, n);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) Put(m + r, n + c, acc[r][c]);
  }
};

// 8-bit inputs, 4-bit weights in groups: sums over groups of scale * sum(inputs * (code - zero)).
struct Int8ByInt4 {
  const int8_t* x;    // (M, K), evens then odds in each block
  const float* sums;  // (M, K / 8): of the 8 inputs that meet in one lane
  Weights w;
  Result out;
  OfLanes of_lanes;

  // A block of weights, unsigned, with the scale and the zero point of each lane.
  struct Block {
    Bytes even, odd;
    Floats step, less;
  };
  Block Read(const uint8_t* from, int64_t n, int64_t k) const {
    Bytes both = Xor(LoadBytes(from), 0x88);
    const int64_t at = n * w.G + of_lanes.GroupOf(k);
    Floats less = All(8);
    if (w.zero) less = Sub(less, Sub(All(0), of_lanes(w.zero + at)));
    return {Low(both), High(both), of_lanes(w.scale + at), less};
  }

  // Adds the products of a block.
  Floats AddTo(Floats sum, const Block& block, int64_t m, int64_t k) const {
    const int8_t* in = x + m * w.K + k;
    Ints products = DotNibbles(block.even, block.odd, LoadBytes(in), LoadBytes(in + kBytes));
    // Exact: whole numbers below 2^24.
    Floats total = MulSub(block.less, Load(sums + (m * w.K + k) / 8), ToFloats(products));
    return MulAdd(total, block.step, sum);
  }

  APART void One(int64_t m, int64_t n) const {
    const uint8_t* row = w.at(n, 0);
    out.Put(m, n, Sum(Along(w.K, kBlock, All(0), [=](Floats sum, int64_t k) {
              Prefetch(row + k / 2 + kAheadInRow);
              return AddTo(sum, Read(row + k / 2, n, k), m, k);
            })));
  }

  template <int R, int C>
  void Tile(int64_t m, int64_t n) const {
    const int64_t K = w.K;
    const uint8_t* rows = w.at(n, 0);
    Floats acc[R][C];
    EACH(r, R)
      EACH(c, C) acc[r][c] = All(0);
    for (int64_t k = 0; k < K; k += kBlock)
      EACH(c, C) {
        const uint8_t* from = rows + (c * K + k) / 2;
        Prefetch(from + kAhead * C * K / 2);
        Block block = Read(from, n + c, k);
        EACH(r, R) acc[r][c] = AddTo(acc[r][c], block, m + r, k);
      }
    EACH(r, R)
      EACH(c, C) out.Put(m + r, n + c, Sum(acc[r][c]));
  }
};

// Float inputs, 4-bit weights in groups, each code looked up in a table of 16 floats.
struct FloatByTable {
  const float* x;  // (M, K), evens then odds in each 2 * kLanes elements
  Weights w;
  const float* table;
  float* out;
  OfLanes of_lanes[4];  // for each quarter of a block

  // A quarter of a block of weights, less their zero points, with the scale of each lane.
  struct Quarter {
    Floats evens, odds, step;
  };
  Quarter Read(const Table& values, const uint8_t* from, int64_t at, int i) const {
    Ints pairs = NibblePairs(from + kLanes * i);
    Floats evens = values[LowNibbles(pairs)], odds = values[HighNibbles(pairs)];
    if (w.zero) {
      Floats less = of_lanes[i](w.zero + at);
      evens = Sub(evens, less), odds = Sub(odds, less);
    }
    return {evens, odds, of_lanes[i](w.scale + at)};
  }

  // Adds the products of a quarter with the inputs from `in` on.
  static Floats AddTo(Floats sum, const Quarter& part, const float* in) {
    Floats products = MulAdd(part.odds, Load(in + kLanes), Mul(part.evens, Load(in)));
    return MulAdd(products, part.step, sum);
  }

  APART void One(int64_t m, int64_t n) const {
    const uint8_t* row = w.at(n, 0);
    const float* in = x + m * w.K;
    const Table values(table);
    Floats acc[4] = {All(0), All(0), All(0), All(0)};
    for (int64_t k = 0; k < w.K; k += kBlock) {
      const int64_t at = n * w.G + of_lanes[0].GroupOf(k);
      Prefetch(row + k / 2 + kAheadInRow);
      EACH(i, 4)
        acc[i] = AddTo(acc[i], Read(values, row + k / 2, at, i), in + k + 2 * kLanes * i);
    }
    out[m * w.N + n] = Sum(Add(Add(acc[0], acc[1]), Add(acc[2], acc[3])));
  }

  template <int R, int C>
  void Tile(int64_t m, int64_t n) const {
    const int64_t K = w.K;
    const uint8_t* rows = w.at(n, 0);
    const Table values(table);
    Floats acc[R][C];
    EACH(r, R)
      EACH(c, C) acc[r][c] = All(0);
    for (int64_t k = 0; k < K; k += kBlock)
      EACH(c, C) {
        const uint8_t* from = rows + (c * K + k) / 2;
        const int64_t at = (n + c) * w.G + of_lanes[0].GroupOf(k);
        Prefetch(from + kAhead * C * K / 2);
        for (int i = 0; i < 4; ++i) {
          Quarter part = Read(values, from, at, i);
          EACH(r, R)
            acc[r][c] = AddTo(acc[r][c], part, x + (m + r) * K + k + 2 * kLanes * i);
        }
      }
    EACH(r, R)
      EACH(c, C) out[(m + r) * w.N + n + c] = Sum(acc[r][c]);
  }
};

// Float inputs, 8-bit weights: sums of inputs * codes.
struct FloatByInt8 {
  const float* x;
  Weights w;
  float* out;

  // A sum over whole vectors, and what is left of the row.
  void Put(int64_t m, int64_t n, float sum) const {
    for (int64_t k = w.K / kLanes * kLanes; k < w.K; ++k)
      sum += x[m * w.K + k] * static_cast<int8_t>(*w.at(n, k));
    out[m * w.N + n] = sum;
  }

  APART void One(int64_t m, int64_t n) const {
    const int8_t* row = reinterpret_cast<const int8_t*>(w.at(n, 0));
    const float* in = x + m * w.K;
    Put(m, n, Sum(Along(w.K, kLanes, All(0), [=](Floats sum, int64_t k) {
          if (k % 64 == 0) PrefetchFar(row + k + kAheadInRow);
          return MulAdd(ToFloats(Widen(row + k)), Load(in + k), sum);
        })));
  }

  template <int R, int C>
  void Tile(int64_t m, int64_t n) const {
    const int64_t K = w.K;
    const int8_t* rows = reinterpret_cast<const int8_t*>(w.at(n, 0));
    Floats acc[R][C];
    EACH(r, R)
      EACH(c, C) acc[r][c] = All(0);
    for (int64_t k = 0; k + kLanes <= K; k += kLanes)
      EACH(c, C) {
        const int8_t* from = rows + c * K + k;
        if (k % 64 == 0) PrefetchFar(from + kAhead * C * K);
        Floats weights = ToFloats(Widen(from));
        EACH(r, R)
          acc[r][c] = MulAdd(weights, Load(x + (m + r) * K + k), acc[r][c]);
      }
    EACH(r, R)
      EACH(c, C) Put(m + r, n + c, Sum(acc[r][c]));
  }
};

#ifdef IS_AVX512
// Many rows. A panel holds 64 columns of weights, four vectors of 16 columns for each step.
constexpr int kVectors = 4;
constexpr int64_t kPanel = kVectors * kLanes;
// Rows of a tile: with 4 vectors of columns, 24 accumulators.
constexpr int64_t kTileRows = 6;
// Rows from which the rearrangement of weights pays, by what is multiplied.
constexpr int64_t kInt8Panels = 16, kInt4Panels = 8, kTablePanels = 10, kWidenPanels = 16;
// Elements along K for which a panel stays in the L2 cache, of bytes and of floats.
constexpr int64_t kDepth = 4096, kFloatDepth = 512;

// Codes in the order in which tiles read them: of each block of rows, 4 of every row, and so on;
// zeros beyond K.
std::vector<int8_t> InTiles(ffi::ThreadPool& pool, const int8_t* x, int64_t M, int64_t K) {
  int64_t padded = (K + 3) / 4 * 4;
  std::vector<int8_t> tiles(M * padded);
  Parallel(pool, M, 64, kTileRows, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; m += kTileRows) {
      int64_t rows = std::min(kTileRows, M - m);
      int8_t* to = tiles.data() + m * padded;
      for (int64_t k = 0; k + 4 <= K; k += 4)
        for (int64_t r = 0; r < rows; ++r, to += 4) std::memcpy(to, x + (m + r) * K + k, 4);
      for (int64_t r = 0; r < rows && K % 4; ++r, to += 4)
        std::memcpy(to, x + (m + r + 1) * K - K % 4, K % 4);
    }
  });
  return tiles;
}

// Elements k to k + 64 of a row of weights as unsigned bytes.
inline Bytes Unsigned(const Weights& w, int64_t n, int64_t k) {
  const uint8_t* from = w.at(std::min(n, w.N - 1), k);
  if (w.bits == 8) {
    Bytes codes = w.K - k >= kBytes ? LoadBytes(from) : LoadPart(from, w.K - k);
    return Xor(codes, 0x80);
  }
  Bytes wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return Low(Xor(_mm512_or_si512(wide, _mm512_slli_epi16(wide, 4)), 8));
}

// Turns 16 rows of 16 quads of bytes into 16 columns.
inline void Transpose(Ints (&x)[16]) {
  Ints y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + 2 + j]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + 2 + j]);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      y[i + j] = _mm512_shuffle_i32x4(x[i + j], x[i + 4 + j], 0x88);
      y[i + 4 + j] = _mm512_shuffle_i32x4(x[i + j], x[i + 4 + j], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    x[j] = _mm512_shuffle_i32x4(y[j], y[8 + j], 0x88);
    x[8 + j] = _mm512_shuffle_i32x4(y[j], y[8 + j], 0xdd);
  }
}

// 16 quads of elements from k on of 16 columns from n on: one vector per quad.
inline void Quads(const Weights& w, int64_t n, int64_t k, Ints (&quads)[16]) {
  for (int i = 0; i < 16; ++i) {
    quads[i] = Unsigned(w, n + i, k);
    PrefetchFar(w.at(std::min(n + i, w.N - 1), k) + 4 * kBytes);
  }
  Transpose(quads);
}

// Fills a panel with unsigned codes: for each quad of elements from k on, four vectors.
inline void PackCodes(const Weights& w, int64_t n, int64_t k, int64_t end, uint8_t* panel) {
  EACH(v, kVectors)
    for (int64_t at = k; at < end; at += kBytes) {
      Ints quads[16];
      Quads(w, n + v * kLanes, at, quads);
      for (int i = 0; i < 16; ++i)
        _mm512_store_si512(panel + ((at - k) / 4 + i) * kPanel * 4 + v * kBytes, quads[i]);
    }
}

// Values that columns from n on have in a group, of scales or zero points.
inline Floats OfColumns(const Weights& w, const float* values, int64_t n, int64_t group) {
  alignas(64) float found[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) found[i] = values[std::min(n + i, w.N - 1) * w.G + group];
  return Load(found);
}

// Stores what lies within N columns.
inline __mmask16 Within(int64_t N, int64_t n) {
  return N - n >= kLanes ? 0xffff : N <= n ? 0 : (1u << (N - n)) - 1;
}

// Adds the products of quads of R rows by a panel.
template <int R>
APART void AddCodes(Ints (&sums)[R][kVectors], const int8_t* x, const uint8_t* panel,
                     int64_t quads) {
  Ints acc[R][kVectors];
  EACH(r, R)
    EACH(v, kVectors) acc[r][v] = sums[r][v];
  for (int64_t q = 0; q < quads; ++q, x += 4 * R, panel += 4 * kPanel) {
    Bytes w[kVectors];
    EACH(v, kVectors) w[v] = _mm512_load_si512(panel + v * kBytes);
    EACH(r, R) {
      int32_t quad;
      std::memcpy(&quad, x + 4 * r, 4);
      Bytes in = _mm512_set1_epi32(quad);
      EACH(v, kVectors) acc[r][v] = Dot(acc[r][v], w[v], in);
    }
  }
  EACH(r, R)
    EACH(v, kVectors) sums[r][v] = acc[r][v];
}

// Runs tile.Run<rows>(m) over blocks of rows.
template <typename Tile>
inline void ForRows(int64_t M, const Tile& tile) {
  int64_t m = 0;
  for (; m + kTileRows <= M; m += kTileRows) tile.template Run<kTileRows>(m);
  if (M - m == 5) tile.template Run<5>(m);
  if (M - m == 4) tile.template Run<4>(m);
  if (M - m == 3) tile.template Run<3>(m);
  if (M - m == 2) tile.template Run<2>(m);
  if (M - m == 1) tile.template Run<1>(m);
}

// Results of 16 columns.
inline void Put(const Result& to, int64_t m, int64_t n, Floats sum) {
  const __mmask16 within = Within(to.N, n);
  const int64_t at = m * to.N + n;
  if (to.row) sum = Mul(sum, All(to.row[m]));
  if (to.column) sum = Mul(sum, _mm512_maskz_loadu_ps(within, to.column + n));
  if (to.type == Result::kFloat32)
    return _mm512_mask_storeu_ps(static_cast<float*>(to.out) + at, within, sum);
  __m512i bits = _mm512_castps_si512(sum), high = _mm512_srli_epi32(bits, 16);
  __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  __mmask16 is_nan = _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, is_nan, high, _mm512_set1_epi32(0x40));
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(to.out) + at, within,
                           _mm512_cvtepi32_epi16(rounded));
}
inline void Put(const Result& to, int64_t m, int64_t n, Ints sum) {
  if (to.type != Result::kInt32) return Put(to, m, n, ToFloats(sum));
  _mm512_mask_storeu_epi32(static_cast<int32_t*>(to.out) + m * to.N + n, Within(to.N, n), sum);
}

// Sums of codes over a part of K, added to those of the parts before.
struct Int8Tile {
  const int8_t* x;  // in tiles of `quads` quads per row
  const int32_t* sums;
  const uint8_t* panel;
  int64_t quads, first, count, n;  // of them, those that the panel holds
  int32_t* part;  // (M, kPanel): what the parts before gave, unless this is the first
  const Result& out;

  template <int R>
  void Run(int64_t m) const {
    Ints acc[R][kVectors];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kVectors; ++v)
        acc[r][v] = first ? LoadBytes(part + (m + r) * kPanel + v * kLanes)
                          : _mm512_set1_epi32(-128 * sums[m + r]);
    AddCodes<R>(acc, x + m * quads * 4 + first * 4 * R, panel, count);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kVectors; ++v)
        if (first + count == quads) Put(out, m + r, n + v * kLanes, acc[r][v]);
        else _mm512_storeu_si512(part + (m + r) * kPanel + v * kLanes, acc[r][v]);
  }
};

void PanelInt8(ffi::ThreadPool& pool, const int8_t* x, int64_t M, const Weights& w,
               const Result& out) {
  std::vector<int32_t> sums = SumsOf<int32_t>(x, M, w.K);
  std::vector<int8_t> tiles = InTiles(pool, x, M, w.K);
  int64_t quads = (w.K + 3) / 4;
  Parallel(pool, w.N, kPanel, kPanel, [&](int64_t begin, int64_t last) {
    uint8_t* panel = Scratch<uint8_t>(0, kPanel * kDepth);
    int32_t* part = Scratch<int32_t>(2, w.K > kDepth ? M * kPanel : 0);
    for (int64_t n = begin; n < last; n += kPanel)
      for (int64_t k = 0; k < w.K; k += kDepth) {
        int64_t end = std::min(k + kDepth, w.K);
        PackCodes(w, n, k, end, panel);
        int64_t first = k / 4, count = (end - k + 3) / 4;
        ForRows(M, Int8Tile{tiles.data(), sums.data(), panel, quads, first, count, n, part, out});
      }
  });
}

// Sums over groups, added to those of the parts of K before.
struct Int4Tile {
  const int8_t* x;
  const float* sums;  // (M, parts): of the inputs of each part of a group
  const uint8_t* panel;
  const float *scale, *less;  // (parts, kPanel)
  const std::vector<int64_t>& parts;  // where they begin, in quads
  int64_t first, last, n;
  float* part;  // (M, kPanel): what the parts before gave, unless this is the first
  const Result& out;

  template <int R>
  void Run(int64_t m) const {
    const int64_t count = parts.size() - 1, quads = parts.back(), start = parts[first];
    alignas(64) float total[R][kPanel] = {};
    for (int64_t p = first; p < last; ++p) {
      Ints acc[R][kVectors];
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < kVectors; ++v) acc[r][v] = NoInts();
      AddCodes<R>(acc, x + m * quads * 4 + parts[p] * 4 * R,
                  panel + (parts[p] - start) * 4 * kPanel, parts[p + 1] - parts[p]);
      for (int v = 0; v < kVectors; ++v) {
        Floats step = Load(scale + p * kPanel + v * kLanes), off = Load(less + p * kPanel + v * kLanes);
        for (int r = 0; r < R; ++r) {
          float* sum = total[r] + v * kLanes;
          Floats part = MulSub(off, All(sums[(m + r) * count + p]), ToFloats(acc[r][v]));
          _mm512_store_ps(sum, MulAdd(part, step, Load(sum)));
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kVectors; ++v) {
        float* before = part + (m + r) * kPanel + v * kLanes;
        Floats sum = Load(total[r] + v * kLanes);
        if (first) sum = Add(sum, Load(before));
        if (last == count) Put(out, m + r, n + v * kLanes, sum);
        else _mm512_storeu_ps(before, sum);
      }
  }
};

// Parts of groups that lie within one panel: where each begins, in elements.
inline std::vector<int64_t> Parts(int64_t K, int64_t group) {
  std::vector<int64_t> parts;
  for (int64_t k = 0; k < K; k = std::min((k / group + 1) * group, (k / kDepth + 1) * kDepth))
    parts.push_back(k);
  parts.push_back(K);
  return parts;
}

void PanelInt4(ffi::ThreadPool& pool, const int8_t* x, int64_t M, const Weights& w,
               const Result& out) {
  std::vector<int64_t> parts = Parts(w.K, w.group());
  const int64_t count = parts.size() - 1;
  std::vector<float> sums(M * count);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t p = 0; p < count; ++p)
      sums[m * count + p] = SumOf(x + m * w.K + parts[p], parts[p + 1] - parts[p]);
  std::vector<int8_t> tiles = InTiles(pool, x, M, w.K);
  std::vector<int64_t> quads = parts;
  for (int64_t& part : quads) part /= 4;
  Parallel(pool, w.N, kPanel, kPanel, [&](int64_t begin, int64_t end) {
    uint8_t* panel = Scratch<uint8_t>(0, kPanel * kDepth);
    float *scale = Scratch<float>(1, 2 * count * kPanel), *less = scale + count * kPanel;
    float* part = Scratch<float>(2, w.K > kDepth ? M * kPanel : 0);
    for (int64_t n = begin; n < end; n += kPanel) {
      for (int64_t p = 0; p < count; ++p)
        for (int64_t i = 0; i < kPanel; ++i) {
          int64_t at = std::min(n + i, w.N - 1) * w.G + parts[p] / w.group();
          scale[p * kPanel + i] = w.scale[at];
          less[p * kPanel + i] = w.zero ? 8 + w.zero[at] : 8;
        }
      for (int64_t first = 0, last; first < count; first = last) {
        int64_t k1 = std::min(parts[first] + kDepth, w.K);
        last = std::lower_bound(parts.begin(), parts.end(), k1) - parts.begin();
        PackCodes(w, n, parts[first], k1, panel);
        ForRows(M, Int4Tile{tiles.data(), sums.data(), panel, scale, less, quads, first, last, n,
                            part, out});
      }
    }
  });
}

// Fills a panel with floats: (code - zero) * scale, for each element from k on, four vectors. A
// code of 4 bits stands for its value in the table.
inline void PackFloats(const Weights& w, const float* table, int64_t n, int64_t k, int64_t end,
                       float* panel) {
  alignas(64) float unsigned_order[16] = {};
  for (int i = 0; table && i < 16; ++i) unsigned_order[i] = table[i ^ 8];
  const Table values(unsigned_order);
  for (int v = 0; v < kVectors; ++v) {
    int64_t next = 0;  // where other scales begin
    Floats step = All(1), less = All(0);
    for (int64_t from = k; from < end; from += kBytes) {
      Ints quads[16];
      Quads(w, n + v * kLanes, from, quads);
      for (int64_t at = from; at < std::min(from + kBytes, end); ++at) {
        if (at >= next) {
          int64_t group = at / w.group();
          next = (group + 1) * w.group();
          if (w.scale) step = OfColumns(w, w.scale, n + v * kLanes, group);
          if (w.zero) less = OfColumns(w, w.zero, n + v * kLanes, group);
        }
        Ints codes = _mm512_srl_epi32(quads[(at - from) / 4], _mm_cvtsi32_si128(8 * (at % 4)));
        Floats value = table ? values[codes]
                             : Sub(ToFloats(_mm512_and_si512(codes, _mm512_set1_epi32(255))), All(128));
        _mm512_store_ps(panel + (at - k) * kPanel + v * kLanes, Mul(Sub(value, less), step));
      }
    }
  }
}

// Sums over a part of K, added to those of the parts before.
struct FloatTile {
  const float* x;
  const float* panel;
  int64_t first, count, K, N, n;
  float* out;

  template <int R>
  void Run(int64_t m) const {
    Floats acc[R][kVectors];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kVectors; ++v)
        acc[r][v] = first ? _mm512_maskz_loadu_ps(Within(N, n + v * kLanes),
                                                  out + (m + r) * N + n + v * kLanes)
                          : All(0);
    const float *in = x + m * K + first, *weights = panel;
    for (int64_t k = 0; k < count; ++k, ++in, weights += kPanel) {
      Floats w[kVectors];
      for (int v = 0; v < kVectors; ++v) w[v] = _mm512_load_ps(weights + v * kLanes);
      for (int r = 0; r < R; ++r) {
        const Floats value = All(in[r * K]);
        for (int v = 0; v < kVectors; ++v) acc[r][v] = MulAdd(w[v], value, acc[r][v]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kVectors; ++v)
        _mm512_mask_storeu_ps(out + (m + r) * N + n + v * kLanes, Within(N, n + v * kLanes),
                              acc[r][v]);
  }
};

void PanelFloat(ffi::ThreadPool& pool, const float* x, int64_t M, const Weights& w,
                const float* table, float* out) {
  Parallel(pool, w.N, kPanel, kPanel, [&](int64_t begin, int64_t end) {
    float* panel = Scratch<float>(0, kPanel * kFloatDepth);
    for (int64_t n = begin; n < end; n += kPanel)
      for (int64_t k = 0; k < w.K; k += kFloatDepth) {
        int64_t last = std::min(k + kFloatDepth, w.K);
        PackFloats(w, table, n, k, last, panel);
        ForRows(M, FloatTile{x, panel, k, last - k, w.K, w.N, n, out});
      }
  });
}
#endif

// Scales and codes of rows, by the largest magnitude of each: the bits of `quantize` in XLA, which
// multiplies by reciprocals and flushes subnormals to zero. T is float, or uint16_t for bfloat16.
inline uint32_t BitsOf(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline uint32_t BitsOf(uint16_t x) { return static_cast<uint32_t>(x) << 16; }

inline float FloatOf(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

constexpr uint32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000, kLeastNormal = 0x00800000;

template <typename T>
APART float ScaleOf(const T* x, int64_t K, int64_t reach) {
  // Magnitudes are in the order of their bits, NaN above infinity.
  uint32_t most = 0;
  for (int64_t k = 0; k < K; ++k) most = std::max(most, BitsOf(x[k]) & kMagnitude);
  if (most >= kInfinity) return FloatOf(kInfinity | 0x400000);
  const float scale = FloatOf(most) * (1 / static_cast<float>(reach));
  if (scale < FloatOf(kLeastNormal)) return 1;
  return std::min(scale, 1 / FloatOf(kLeastNormal));
}

template <typename T>
APART void CodesOf(const T* x, int64_t K, float inverse, float qmin, float qmax, int8_t* codes) {
  // Adding 1.5 * 2^23 rounds to a whole number, ties to even, and leaves it in the low bits.
  const float shift = 12582912.0f;
  for (int64_t k = 0; k < K; ++k) {
    uint32_t bits = BitsOf(x[k]);
    float value = FloatOf((bits & kMagnitude) < kLeastNormal ? 0 : bits) * inverse;
    value = value < qmin ? qmin : value;
    value = value > qmax ? qmax : value;
    codes[k] = static_cast<int8_t>(BitsOf(value + shift) - BitsOf(shift));
  }
}

template <typename T>
void QuantizeRows(ffi::ThreadPool& pool, const T* x, int64_t M, int64_t K, int64_t qmin,
                  int64_t qmax, int8_t* codes, float* scales) {
  const int64_t least = std::max<int64_t>(1, kQuantizedAtOnce / std::max<int64_t>(1, K));
  Parallel(pool, M, least, 1, [=](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) {
      const float scale = scales[m] = ScaleOf(x + m * K, K, std::min(-qmin, qmax));
      if (scale == scale) CodesOf(x + m * K, K, 1 / scale, qmin, qmax, codes + m * K);
      else std::memset(codes + m * K, 0, K);
    }
  });
}

void DotInt8(ffi::ThreadPool& pool, const int8_t* x, int64_t M, const Weights& w,
             const Result& out) {
#ifdef IS_AVX512
  if (M >= kInt8Panels && w.K) return PanelInt8(pool, x, M, w, out);
#endif
  std::vector<int32_t> sums = SumsOf<int32_t>(x, M, w.K);
  ForTiles(pool, M, w, w.K, Int8ByInt8{x, sums.data(), w, out});
}

void DotInt4(ffi::ThreadPool& pool, const int8_t* x, int64_t M, const Weights& w,
             const Result& out) {
#ifdef IS_AVX512
  if (M >= kInt4Panels && w.K) return PanelInt4(pool, x, M, w, out);
#endif
  std::vector<int8_t> arranged = EvensThenOdds(x, M * w.K, kBlock);
  std::vector<float> sums = SumsOf<float>(x, M * w.K / 8, 8);
  ForTiles(pool, M, w, w.K,
           Int8ByInt4{arranged.data(), sums.data(), w, out, OfLanes(0, 8, w.group())});
}

void DotLookup(ffi::ThreadPool& pool, const float* x, int64_t M, const Weights& w,
               const float* table, float* out) {
#ifdef IS_AVX512
  if (M >= kTablePanels && w.K) return PanelFloat(pool, x, M, w, table, out);
#endif
  std::vector<float> arranged = EvensThenOdds(x, M * w.K, 2 * kLanes);
  auto quarter = [&](int i) { return OfLanes(2 * kLanes * i, 2, w.group()); };
  ForTiles(pool, M, w, 4 * w.K,
           FloatByTable{arranged.data(), w, table, out,
                        {quarter(0), quarter(1), quarter(2), quarter(3)}});
}

void DotWiden(ffi::ThreadPool& pool, const float* x, int64_t M, const Weights& w, float* out) {
#ifdef IS_AVX512
  if (M >= kWidenPanels && w.K) return PanelFloat(pool, x, M, w, nullptr, out);
#endif
  ForTiles(pool, M, w, 4 * w.K, FloatByInt8{x, w, out});
}

}  // namespace INSTRUCTIONS
}  // namespace

#endif
