// Products with quantized weights for x86 CPUs that have AVX512-VNNI, called through XLA's FFI.
//
// Inputs are rows (M, K) and weights rows (N, K): the contracted axis is last in both. A vector
// holds 64 elements of one row, each of its 16 lanes sums up some of them, and lanes are added at
// the very end. So weights are read once, as they lie in memory, 4-bit ones two to a byte.
//
// VPDPBUSD multiplies unsigned by signed bytes. Weights are made unsigned by an offset (128, or 8
// for nibbles), which leaves offset * sum(inputs) to be taken off: once per row, not per weight.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define VECTOR __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))

namespace ffi = xla::ffi;

namespace {

// Inputs that stay in the L2 cache while rows of weights pass by, in bytes.
constexpr int64_t kInputsInCache = 1 << 18;
// Rows of weights that stay in the L1 cache while blocks of inputs pass by.
constexpr int64_t kColumns = 64;
// Elements of a 4-bit weight that one vector holds.
constexpr int64_t kBlock = 128;

// What threads share that work on one product.
struct Pieces {
  std::function<void(int64_t, int64_t)> work;
  int64_t count, size;
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::condition_variable all_done;
  int64_t done = 0;

  // Takes pieces until none is left. A thread that comes late finds none, and touches nothing.
  void Run() {
    for (int64_t begin; (begin = next.fetch_add(size)) < count;) {
      int64_t end = std::min(begin + size, count);
      work(begin, end);
      std::lock_guard<std::mutex> lock(mutex);
      if ((done += end - begin) == count) all_done.notify_one();
    }
  }
};

// Runs work(begin, end) over [0, count) on the threads of the pool and on this one, and waits for
// pieces that were begun, not for threads that were asked: all of them may wait in calls like this.
void Parallel(ffi::ThreadPool& pool, int64_t count, int64_t least,
              std::function<void(int64_t, int64_t)> work) {
  int64_t threads = std::min(pool.num_threads(), std::max<int64_t>(1, count / least));
  if (threads <= 1) return work(0, count);
  auto pieces = std::make_shared<Pieces>();
  pieces->work = std::move(work);
  pieces->count = count;
  // Small ones, because the cores of one machine are rarely equally fast.
  pieces->size = std::max(least, (count / (threads * 8) + 3) / 4 * 4);
  for (int64_t i = 0; i + 1 < threads; ++i) pool.Schedule([pieces] { pieces->Run(); });
  pieces->Run();
  std::unique_lock<std::mutex> lock(pieces->mutex);
  pieces->all_done.wait(lock, [&] { return pieces->done == count; });
}

// Calls tile<rows>(m, n, columns) over blocks of rows that stay in the cache, 4 rows at a time.
template <typename Tile>
void ForTiles(ffi::ThreadPool& pool, int64_t M, int64_t N, int64_t row_bytes, const Tile& tile) {
  row_bytes = std::max<int64_t>(1, row_bytes);
  int64_t rows = std::max<int64_t>(4, kInputsInCache / row_bytes / 4 * 4);
  int64_t least = std::max<int64_t>(16, (1 << 16) / row_bytes);
  Parallel(pool, N, least, [&](int64_t first, int64_t last) {
    for (int64_t n0 = first; n0 < last; n0 += kColumns)
      for (int64_t m0 = 0; m0 < M; m0 += rows) {
        int64_t n1 = std::min(n0 + kColumns, last), m1 = std::min(m0 + rows, M), m = m0;
        for (; m + 4 <= m1; m += 4) tile.template Run<4>(m, n0, n1);
        if (m1 - m == 3) tile.template Run<3>(m, n0, n1);
        if (m1 - m == 2) tile.template Run<2>(m, n0, n1);
        if (m1 - m == 1) tile.template Run<1>(m, n0, n1);
      }
  });
}

// Asks early for the weights of columns to come, so many steps ahead: by itself a core has too few
// reads under way to use the memory's bandwidth.
constexpr int64_t kAhead = 4;
inline void Prefetch(const void* weights) { __builtin_prefetch(weights, 0, 3); }

// Gives a kernel columns n0 to n1, four at a time.
#define FOR_COLUMNS(R)                          \
  int64_t n = n0;                               \
  for (; n + 4 <= n1; n += 4) Columns<R, 4>(m, n); \
  for (; n < n1; ++n) Columns<R, 1>(m, n);

// 8-bit inputs, 8-bit weights: sums of codes, exact.
struct Int8 {
  const int8_t *x, *w;
  const int32_t* sums;  // (M,): of the inputs of each row
  int32_t* out;
  int64_t K, N;

  template <int R, int C>
  VECTOR void Columns(int64_t m, int64_t n) const {
    __m512i acc[R][C];
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) acc[r][c] = _mm512_setzero_si512();
    for (int64_t k = 0; k < K; k += 64) {
      __mmask64 rest = K - k >= 64 ? ~0ull : ~0ull >> (64 - (K - k));
      __m512i in[R];
      for (int r = 0; r < R; ++r) in[r] = _mm512_maskz_loadu_epi8(rest, x + (m + r) * K + k);
      for (int c = 0; c < C; ++c) {
        const int8_t* from = w + (n + c) * K + k;
        Prefetch(from + kAhead * C * K);
        __m512i weights = _mm512_maskz_loadu_epi8(rest, from);
        weights = _mm512_xor_si512(weights, flip);
        for (int r = 0; r < R; ++r) acc[r][c] = _mm512_dpbusd_epi32(acc[r][c], weights, in[r]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c)
        out[(m + r) * N + n + c] = _mm512_reduce_add_epi32(acc[r][c]) - 128 * sums[m + r];
  }

  template <int R>
  VECTOR void Run(int64_t m, int64_t n0, int64_t n1) const {
    FOR_COLUMNS(R)
  }
};

// Rows of inputs in the order in which nibbles lie: in each block the 64 even ones, then the odd.
template <typename T>
std::vector<T> EvensThenOdds(const T* x, int64_t size) {
  std::vector<T> arranged(size);
  for (int64_t b = 0; b < size; b += kBlock)
    for (int64_t i = 0; i < kBlock / 2; ++i) {
      arranged[b + i] = x[b + 2 * i];
      arranged[b + kBlock / 2 + i] = x[b + 2 * i + 1];
    }
  return arranged;
}

// Sums of `width` inputs each.
template <typename Sum, typename T>
std::vector<Sum> SumsOf(const T* x, int64_t size, int64_t width) {
  std::vector<Sum> sums(size / width);
  for (size_t i = 0; i < sums.size(); ++i)
    for (int64_t j = 0; j < width; ++j) sums[i] += x[i * width + j];
  return sums;
}

// 8-bit inputs, 4-bit weights in groups: sums over groups of scale * sum(inputs * (code - zero)).
struct Int4 {
  const int8_t* x;      // (M, K), evens then odds
  const float* sums;  // (M, K / 8): of the 8 inputs that meet in one lane
  const uint8_t* w;
  const float *scale, *zero;  // (N, G); zero may be null
  float* out;
  int64_t K, N, G;
  int32_t lane_group[16];  // which of the groups of a block a lane belongs to

  template <int R, int C>
  VECTOR void Columns(int64_t m, int64_t n) const {
    __m512 acc[R][C];
    const __m512i low = _mm512_set1_epi8(0x0f), flip = _mm512_set1_epi8(static_cast<char>(0x88));
    const __m512i lanes = _mm512_loadu_si512(lane_group);
    const __mmask16 present = (2u << lane_group[15]) - 1;
    const int64_t group = K / G;
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) acc[r][c] = _mm512_setzero_ps();
    for (int64_t k = 0; k < K; k += kBlock) {
      for (int c = 0; c < C; ++c) {
        const uint8_t* from = w + ((n + c) * K + k) / 2;
        Prefetch(from + kAhead * C * K / 2);
        __m512i both = _mm512_loadu_si512(from);
        both = _mm512_xor_si512(both, flip);
        __m512i even = _mm512_and_si512(both, low);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        const int64_t at = (n + c) * G + k / group;
        __m512 step = _mm512_maskz_loadu_ps(present, scale + at), less = _mm512_set1_ps(8);
        step = _mm512_permutexvar_ps(lanes, step);
        if (zero) {
          __m512 codes = _mm512_permutexvar_ps(lanes, _mm512_maskz_loadu_ps(present, zero + at));
          less = _mm512_add_ps(less, codes);
        }
        for (int r = 0; r < R; ++r) {
          const int8_t* in = x + (m + r) * K + k;
          __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), even, _mm512_loadu_si512(in));
          sum = _mm512_dpbusd_epi32(sum, odd, _mm512_loadu_si512(in + kBlock / 2));
          __m512 inputs = _mm512_loadu_ps(sums + ((m + r) * K + k) / 8);
          // Exact: whole numbers below 2^24.
          __m512 total = _mm512_fnmadd_ps(less, inputs, _mm512_cvtepi32_ps(sum));
          acc[r][c] = _mm512_fmadd_ps(total, step, acc[r][c]);
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) out[(m + r) * N + n + c] = _mm512_reduce_add_ps(acc[r][c]);
  }

  template <int R>
  VECTOR void Run(int64_t m, int64_t n0, int64_t n1) const {
    FOR_COLUMNS(R)
  }
};

// Float inputs, 4-bit weights in groups, each code looked up in a table of 16 floats.
struct Lookup {
  const float* x;     // (M, K), evens then odds
  const uint8_t* w;
  const float *scale, *zero, *table;
  float* out;
  int64_t K, N, G;

  template <int R, int C>
  VECTOR void Columns(int64_t m, int64_t n) const {
    __m512 acc[R][C];
    const __m512i low = _mm512_set1_epi8(0x0f);
    const __m512 values = _mm512_loadu_ps(table);
    const int64_t group = K / G;
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) acc[r][c] = _mm512_setzero_ps();
    for (int64_t k = 0; k < K; k += kBlock) {
      for (int c = 0; c < C; ++c) {
        const uint8_t* from = w + ((n + c) * K + k) / 2;
        Prefetch(from + kAhead * C * K / 2);
        __m512i both = _mm512_loadu_si512(from);
        alignas(64) uint8_t even[64], odd[64];
        _mm512_store_si512(even, _mm512_and_si512(both, low));
        _mm512_store_si512(odd, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
        // 16 lanes of evens and 16 of odds make up 32 elements in a row: of one group.
        for (int i = 0; i < 4; ++i) {
          const int64_t at = (n + c) * G + (k + 32 * i) / group;
          auto look_up = [&](const uint8_t* codes) VECTOR {
            __m128i part = _mm_load_si128(reinterpret_cast<const __m128i*>(codes + 16 * i));
            return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(part), values);
          };
          __m512 step = _mm512_set1_ps(scale[at]);
          __m512 less = _mm512_set1_ps(zero ? zero[at] : 0);
          __m512 evens = look_up(even), odds = look_up(odd);
          if (zero) evens = _mm512_sub_ps(evens, less), odds = _mm512_sub_ps(odds, less);
          for (int r = 0; r < R; ++r) {
            const float* in = x + (m + r) * K + k + 16 * i;
            __m512 sum = _mm512_mul_ps(evens, _mm512_loadu_ps(in));
            sum = _mm512_fmadd_ps(odds, _mm512_loadu_ps(in + kBlock / 2), sum);
            acc[r][c] = _mm512_fmadd_ps(sum, step, acc[r][c]);
          }
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c)
        out[(m + r) * N + n + c] = _mm512_reduce_add_ps(acc[r][c]);
  }

  template <int R>
  VECTOR void Run(int64_t m, int64_t n0, int64_t n1) const {
    FOR_COLUMNS(R)
  }
};

// Float inputs, 8-bit weights: sums of inputs * codes.
struct Widen {
  const float* x;
  const int8_t* w;
  float* out;
  int64_t K, N;

  template <int R, int C>
  VECTOR void Columns(int64_t m, int64_t n) const {
    __m512 acc[R][C];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) acc[r][c] = _mm512_setzero_ps();
    for (int64_t k = 0; k < K; k += 16) {
      __mmask16 rest = K - k >= 16 ? 0xffff : 0xffff >> (16 - (K - k));
      __m512 in[R];
      for (int r = 0; r < R; ++r) in[r] = _mm512_maskz_loadu_ps(rest, x + (m + r) * K + k);
      for (int c = 0; c < C; ++c) {
        const int8_t* from = w + (n + c) * K + k;
        if (k % 64 == 0) Prefetch(from + kAhead * C * K);
        __m128i codes = _mm_maskz_loadu_epi8(rest, from);
        __m512 weights = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
        for (int r = 0; r < R; ++r) acc[r][c] = _mm512_fmadd_ps(weights, in[r], acc[r][c]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) out[(m + r) * N + n + c] = _mm512_reduce_add_ps(acc[r][c]);
  }

  template <int R>
  VECTOR void Run(int64_t m, int64_t n0, int64_t n1) const {
    FOR_COLUMNS(R)
  }
};

template <ffi::DataType T>
using In = ffi::Buffer<T>;
template <ffi::DataType T>
using Out = ffi::ResultBuffer<T>;

ffi::Error DotInt8(ffi::ThreadPool pool, In<ffi::S8> x, In<ffi::S8> w, Out<ffi::S32> out) {
  int64_t M = x.dimensions()[0], K = x.dimensions()[1], N = w.dimensions()[0];
  std::vector<int32_t> sums = K ? SumsOf<int32_t>(x.typed_data(), M * K, K) : std::vector<int32_t>(M);
  ForTiles(pool, M, N, K,
           Int8{x.typed_data(), w.typed_data(), sums.data(), out->typed_data(), K, N});
  return ffi::Error::Success();
}

ffi::Error DotInt4(ffi::ThreadPool pool, In<ffi::S8> x, ffi::AnyBuffer w, In<ffi::F32> scale,
                   In<ffi::F32> zero, Out<ffi::F32> out) {
  int64_t M = x.dimensions()[0], K = x.dimensions()[1];
  int64_t N = scale.dimensions()[0], G = scale.dimensions()[1];
  std::vector<int8_t> arranged = EvensThenOdds(x.typed_data(), M * K);
  std::vector<float> sums = SumsOf<float>(x.typed_data(), M * K, 8);
  Int4 kernel{arranged.data(), sums.data(), static_cast<const uint8_t*>(w.untyped_data()),
              scale.typed_data(), zero.element_count() ? zero.typed_data() : nullptr,
              out->typed_data(), K, N, G, {}};
  for (int lane = 0; lane < 16; ++lane)
    kernel.lane_group[lane] = static_cast<int32_t>(8 * lane / (G ? std::min(K / G, kBlock) : 1));
  ForTiles(pool, M, N, K, kernel);
  return ffi::Error::Success();
}

ffi::Error DotLookup(ffi::ThreadPool pool, In<ffi::F32> x, ffi::AnyBuffer w, In<ffi::F32> scale,
                     In<ffi::F32> zero, In<ffi::F32> table, Out<ffi::F32> out) {
  int64_t M = x.dimensions()[0], K = x.dimensions()[1];
  int64_t N = scale.dimensions()[0], G = scale.dimensions()[1];
  std::vector<float> arranged = EvensThenOdds(x.typed_data(), M * K);
  ForTiles(pool, M, N, 4 * K,
           Lookup{arranged.data(), static_cast<const uint8_t*>(w.untyped_data()),
                  scale.typed_data(), zero.element_count() ? zero.typed_data() : nullptr,
                  table.typed_data(), out->typed_data(), K, N, G});
  return ffi::Error::Success();
}

ffi::Error DotWiden(ffi::ThreadPool pool, In<ffi::F32> x, In<ffi::S8> w, Out<ffi::F32> out) {
  int64_t M = x.dimensions()[0], K = x.dimensions()[1], N = w.dimensions()[0];
  ForTiles(pool, M, N, 4 * K, Widen{x.typed_data(), w.typed_data(), out->typed_data(), K, N});
  return ffi::Error::Success();
}

}  // namespace

#define HANDLER(name, function, binding) \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() binding)
#define ARG(T) .Arg<In<ffi::T>>()
#define RET(T) .Ret<ffi::Buffer<ffi::T>>()

HANDLER(jaxquant_dot_int8, DotInt8, ARG(S8) ARG(S8) RET(S32));
HANDLER(jaxquant_dot_int4, DotInt4, ARG(S8).Arg<ffi::AnyBuffer>() ARG(F32) ARG(F32) RET(F32));
HANDLER(jaxquant_dot_lookup, DotLookup,
        ARG(F32).Arg<ffi::AnyBuffer>() ARG(F32) ARG(F32) ARG(F32) RET(F32));
HANDLER(jaxquant_dot_widen, DotWiden, ARG(F32) ARG(S8) RET(F32));

extern "C" int jaxquant_can_run() {
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

#else
extern "C" int jaxquant_can_run() { return 0; }
#endif
