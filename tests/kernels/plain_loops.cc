// Compares the kernels of one instruction set with plain loops, for emulators and sanitizers: without
// XLA, on one thread, or on several where THREADS is the file that shares work among them. SOURCE is the
// file of the instruction set, KERNELS its table, SAME_AS a table with the same results, bit for bit.

#include <array>
#include <cmath>
#include <cstdio>
#include <random>

#include SOURCE
#ifdef THREADS
#include THREADS
#endif

using namespace jaxquant;

#ifdef THREADS
ThreadPool pool;
#else
void jaxquant::Parallel(ThreadPool&, int64_t count, int64_t, int64_t,
                        std::function<void(int64_t, int64_t)> work) {
  work(0, count);
}
int64_t jaxquant::Threads(ThreadPool&) { return 4; }

char no_threads;
ThreadPool& pool = reinterpret_cast<ThreadPool&>(no_threads);
#endif

int wrong = 0;

void Expect(double found, double wanted, double tolerance, const char* kernel) {
  if (std::fabs(found - wanted) <= tolerance) return;
  if (wrong++ < 5) std::printf("%s: got %g, wanted %g\n", kernel, found, wanted);
}

// Results of dot_int8 or dot_groups equal those of SAME_AS.
template <typename Kernel, typename T>
void ExpectSame([[maybe_unused]] Kernel kernel, [[maybe_unused]] const std::vector<int8_t>& x,
                [[maybe_unused]] int64_t M, [[maybe_unused]] const Weights& w,
                [[maybe_unused]] Result to, [[maybe_unused]] const std::vector<T>& found) {
#ifdef SAME_AS
  std::vector<T> others(found.size());
  to.out = others.data();
  (SAME_AS.*kernel)(pool, x.data(), M, w, to);
  for (size_t i = 0; i < found.size(); ++i)
    Expect(std::memcmp(&found[i], &others[i], sizeof(T)), 0, 0, "bits of another instruction set");
#endif
}

float FromHalf(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float number;
  std::memcpy(&number, &bits, 4);
  return number;
}

// Arrays of exactly the sizes that kernels may read and write, so that sanitizers see what lies outside.
void CheckInt8(int64_t M, int64_t K, int64_t N) {
  std::mt19937 random(1);
  std::vector<int8_t> x(M * K), w(N * K);
  std::vector<float> real(M * K), floats(M * N);
  std::vector<int32_t> ints(M * N);
  for (auto& v : x) v = random();
  for (auto& v : w) v = random();
  for (auto& v : real) v = static_cast<int>(random() % 1000) / 500.f - 1;

  Weights weights{reinterpret_cast<const uint8_t*>(w.data()), N, K, 8};
  const Result to{ints.data(), N, Result::kInt32};
  KERNELS.dot_int8(pool, x.data(), M, weights, to);
  ExpectSame(&Kernels::dot_int8, x, M, weights, to, ints);
  KERNELS.dot_widen(pool, real.data(), M, weights, floats.data());
  for (int64_t i = 0; i < M * N; ++i) {
    const int64_t m = i / N, n = i % N;
    double exact = 0, sum = 0;
    for (int64_t k = 0; k < K; ++k) {
      exact += x[m * K + k] * w[n * K + k];
      sum += real[m * K + k] * static_cast<double>(w[n * K + k]);
    }
    Expect(ints[i], exact, 0, "int8 by int8");
    Expect(floats[i], sum, 2e-3 * std::sqrt(K), "float by int8");
  }
}

void CheckGroups(int64_t M, int64_t K, int64_t N, int64_t group, int bits, bool has_zero,
                 Weights::ScaleType type) {
  std::mt19937 random(1);
  const int64_t G = K / group;
  std::vector<int8_t> x(M * K);
  std::vector<uint8_t> w(N * K * bits / 8);
  std::vector<float> real(M * K), scale(N * G), zero(N * G), table(16), floats(M * N), sums(M * N);
  for (auto& v : x) v = random();
  for (auto& v : w) v = random();
  for (auto& v : real) v = static_cast<int>(random() % 1000) / 500.f - 1;
  for (auto& v : scale) v = 1 + (random() % 128) / 128.f;  // exact in 16 bits
  for (auto& v : zero) v = has_zero ? static_cast<int>(random() % 16) - 8 : 0;
  for (int i = 0; i < 16; ++i) table[i] = (i ^ 8) - 8;

  std::vector<uint16_t> stored(N * G);
  for (int64_t i = 0; i < N * G; ++i) {
    const int part = (scale[i] - 1) * 128;
    stored[i] = type == Weights::kFloat16 ? 0x3c00 + part * 8 : 0x3f80 + part;
  }
  const void* scales = type == Weights::kFloat32 ? static_cast<void*>(scale.data()) : stored.data();
  Weights weights{w.data(), N, K, bits, scales, has_zero ? zero.data() : nullptr, G, type};
  std::vector<float> row(M, 0.5f);
  const bool is_widened = bits == 8 && (G == 1 || group % 16 == 0);
  Result halved{floats.data(), N, Result::kFloat32, row.data()};
  KERNELS.dot_groups(pool, x.data(), M, weights, halved);
  // Kernels add the parts of longer rows in other orders.
  if (K <= 4096) ExpectSame(&Kernels::dot_groups, x, M, weights, halved, floats);
  // bfloat16 by rounded weights, where there are kernels for that. What a kernel has not written into its
  // scratch memory does not count, even if it is NaN.
  for (int which : {0, 1, 2}) {
    std::fill_n(Scratch<float>(which, 1 << 17), 1 << 17, NAN);
    std::fill_n(Scratch<uint8_t>(which, 1 << 19), 1 << 19, 0xff);
  }
  std::vector<uint16_t> halves(real.size());
  std::vector<float> rounded(M * N);
  std::transform(real.begin(), real.end(), halves.begin(), ToBFloat16);
  const bool has_halves = KERNELS.dot_lookup_bfloat16 && type == Weights::kFloat32 &&
                          (bits == 4 || is_widened);
  if (has_halves && bits == 4)
    KERNELS.dot_lookup_bfloat16(pool, halves.data(), M, weights, table.data(), rounded.data());
  else if (has_halves)
    KERNELS.dot_widen_bfloat16(pool, halves.data(), M, weights, rounded.data());
  if (bits == 4) KERNELS.dot_lookup(pool, real.data(), M, weights, table.data(), sums.data());
  else if (is_widened) KERNELS.dot_widen(pool, real.data(), M, weights, sums.data());
  for (int64_t i = 0; i < M * N; ++i) {
    const int64_t m = i / N, n = i % N;
    double by_codes = 0, by_floats = 0, by_halves = 0;
    for (int64_t k = 0; k < K; ++k) {
      const int nibble = w[(n * K + k) * bits / 8] >> (4 * (k % 2)) & 15;
      const int code = bits == 4 ? (nibble ^ 8) - 8 : static_cast<int8_t>(w[n * K + k]);
      const int64_t at = n * G + k / group;
      const double value = (code - zero[at]) * static_cast<double>(scale[at]);
      by_codes += x[m * K + k] * value;
      by_floats += real[m * K + k] * value;
      const float weight = (code - zero[at]) * scale[at];
      by_halves += static_cast<double>(FromHalf(halves[m * K + k])) * FromHalf(ToBFloat16(weight));
    }
    Expect(floats[i], by_codes / 2, bits * 0.02 * std::sqrt(K), "int8 by groups");
    if (bits == 4 || is_widened) Expect(sums[i], by_floats, bits * 1e-3 * std::sqrt(K), "float by groups");
    if (has_halves) Expect(rounded[i], by_halves, bits * 1e-3 * std::sqrt(K), "bfloat16 by groups");
  }
}

// Position s of a head, element d, as the type stores it.
double NumberAt(const Attention& a, const void* stored, int64_t position, int64_t d) {
  const auto* row = static_cast<const uint8_t*>(stored) + position * a.bytes();
  if (a.type == Attention::kFloat32) return reinterpret_cast<const float*>(row)[d];
  if (a.type == Attention::kInt8) return static_cast<int8_t>(row[d]);
  if (a.type == Attention::kInt4) return ((row[d / 2] >> 4 * (d % 2) & 15) ^ 8) - 8;
  if (a.type == Attention::kBytes) return a.table[row[d]];
  return FromHalf(reinterpret_cast<const uint16_t*>(row)[d]);
}

void CheckAttention(Attention a, std::vector<int32_t> starts) {
  std::mt19937 random(3);
  const auto unit = [&] { return static_cast<int>(random() % 1000) / 500.f - 1; };
  const int64_t rows = a.B * a.T * a.H * a.G, positions = a.B * a.H * a.S;
  std::vector<float> query(rows * a.D), out(rows * a.D), table(256), scales[2];
  std::vector<uint8_t> stored[2];
  for (auto& v : query) v = unit() / 4;
  for (auto& v : table) v = unit();
  const bool is_float = a.type == Attention::kFloat32, is_half = a.type == Attention::kBFloat16;
  for (auto& bytes : stored) {
    bytes.resize(positions * a.bytes());
    for (auto& v : bytes) v = random();
    // Floats of moderate size, whose last byte has the exponent.
    const int64_t size = is_float ? 4 : 2;
    for (size_t i = size - 1; (is_float || is_half) && i < bytes.size(); i += size)
      bytes[i] = 0x3e | (random() & 0x80);
  }
  for (auto& values : scales) {
    values.resize(positions);
    for (auto& v : values) v = 0.01f + (random() % 100) / 1000.f;
  }
  a.query = query.data(), a.out = out.data(), a.table = table.data(), a.starts = starts.data();
  a.keys = stored[0].data(), a.values = stored[1].data();
  if (!is_float && !is_half) a.key_scale = scales[0].data(), a.value_scale = scales[1].data();
  KERNELS.attend(pool, a);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t b = i / (a.T * a.H * a.G), h = i / a.G % a.H, t = i / (a.H * a.G) % a.T;
    const int64_t first = (b * a.H + h) * a.S;
    std::vector<double> weights(std::min<int64_t>(starts[b] + t + 1, a.S));
    double sum = 0;
    for (size_t s = 0; s < weights.size(); ++s) {
      for (int64_t d = 0; d < a.D; ++d)
        weights[s] += query[i * a.D + d] * NumberAt(a, a.keys, first + s, d);
      weights[s] = std::exp(weights[s] * (a.key_scale ? a.key_scale[first + s] : 1));
      sum += weights[s];
    }
    for (int64_t d = 0; d < a.D; ++d) {
      double wanted = 0;
      for (size_t s = 0; s < weights.size(); ++s)
        wanted += weights[s] / sum * NumberAt(a, a.values, first + s, d) *
                  (a.value_scale ? a.value_scale[first + s] : 1);
      Expect(out[i * a.D + d], wanted, 5e-5 * (1 + std::fabs(wanted)), "attention");
    }
  }
}

// A window of 2 x 3 blocks of 2 x 3 elements, at row 2 and column 6 of codes with 6 rows.
// A step of a momentum of codes: m = 0.5 m + x in place of m, and -2 x in bfloat16. Blocks of 2 x 3
// elements, in rows of `columns`, a multiple of 6.
void CheckUpdate(int power, int bits, bool has_negative, bool is_random, int64_t columns) {
  using Array = Update::Array;
  const int64_t rows = 4, width = 3, n = rows * columns, last = columns / width;
  const Codebook book{power, bits, (bits == 8 ? 255 : 15) / (has_negative ? 2 : 1), has_negative};
  std::mt19937 random(3);
  std::vector<float> x(n), decoded(n), scale(n / 6, 2);
  std::vector<uint8_t> codes(n * bits / 8);
  std::vector<uint16_t> twice(n);
  for (auto& v : x) v = static_cast<int>(random() % 2001) / 1000.f - (has_negative ? 1 : 0);
  for (auto& v : codes) v = random();

  Update u{};
  u.blocks.columns = columns, u.blocks.width = width, u.blocks.rows = {0, columns};
  u.blocks.axes = {{rows / 2, {2 * columns, last}}};
  u.is_random = is_random, u.slots = 5;
  const float half = 0.5f, one = 1, two = 2;
  const Array stored{Array::kCodes, codes.data(), scale.data(), book, {12345, 678910}};
  const Array floats{Array::kFloat32, x.data(), nullptr, {}, {}};
  const auto value = [&](int64_t m, int64_t k) {
    const int64_t at = m * columns + k;
    const int code = bits == 8 ? codes[at] : codes[at / 2] >> at % 2 * 4 & 15;
    const double part = (code - (has_negative ? book.count : 0)) / static_cast<double>(book.count);
    return std::copysign(std::pow(std::fabs(part), power), part) * scale[m / 2 * last + k / width];
  };
  std::vector<double> wanted(n);
  for (int64_t i = 0; i < n; ++i) wanted[i] = 0.5 * value(i / columns, i % columns) + x[i];
  u.inputs = {floats, stored};
  u.outputs = {stored, {Array::kBFloat16, twice.data(), nullptr, {}, {}}};
  u.steps = {{Update::Step::kCombine, 2, {{1, nullptr}, {-1, &half}, {0, nullptr}, {-1, &one}}},
             {Update::Step::kMultiply, 4, {{-1, &two}, {0, nullptr}}},
             {Update::Step::kNegate, 3, {{4, nullptr}}}};
  KERNELS.update_blocks(pool, u);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t k = 0; k < columns; ++k) {
      double peak = 0;
      for (int64_t i = 0; i < 6; ++i)
        peak = std::fmax(peak, std::fabs(wanted[(m / 2 * 2 + i / 3) * columns + k / 3 * 3 + i % 3]));
      Expect(scale[m / 2 * last + k / width], peak, 1e-6 * peak, "scale of a block");
      // Codes next to each other are no further apart than the largest two.
      const double step = peak * (1 - std::pow(1 - 1.0 / book.count, power));
      const int64_t at = m * columns + k;
      Expect(value(m, k), wanted[at], (is_random ? 1.001 : 0.501) * step, "codes");
      Expect(FromHalf(twice[at]), -2.0 * x[at], std::fabs(x[at]) / 128, "bfloat16");
    }
}

void CheckRow(int64_t K, float size) {
  std::vector<float> x(K);
  std::mt19937 random(2);
  for (auto& v : x) v = (static_cast<int>(random() % 255) / 2.f - 63.5f) * size;
  x[K / 2] = 127 * size;
  std::vector<int8_t> codes(K);
  float scale;
  KERNELS.quantize_float32(pool, x.data(), 1, K, -127, 100, codes.data(), &scale);
  Expect(scale / size, 1.27, 1e-6, "scale");
  for (int64_t k = 0; k < K; ++k)
    Expect(codes[k], std::fmin(std::nearbyint(x[k] * (1 / scale)), 100), 0, "codes");
  x[K / 3] = NAN;
  KERNELS.quantize_float32(pool, x.data(), 1, K, -127, 100, codes.data(), &scale);
  Expect(std::isnan(scale), 1, 0, "scale of NaN");
}

// Subnormals become zero on threads that keep them, too; XLA's threads, which other tests use, flush
// them.
void CheckSubnormals() {
  const float x[2] = {130 * 0x1p-126f, 0x1.8p-127f};
  int8_t codes[2];
  float scale;
  KERNELS.quantize_float32(pool, x, 1, 2, -127, 127, codes, &scale);
  Expect(codes[0], 127, 0, "code of the largest");
  Expect(codes[1], 0, 0, "code of a subnormal");
}

int main() {
  Expect(KERNELS.is_supported(), 1, 0, "support");
  CheckSubnormals();
  for (int64_t K : {3, 64, 101}) CheckRow(K, 1), CheckRow(K, 1e-36f), CheckRow(K, 1e30f);
  for (auto [M, K, N] : std::vector<std::array<int64_t, 3>>{
           {1, 128, 5}, {7, 256, 7}, {5, 203, 6}, {3, 1, 1}, {18, 101, 67},
           {16, 64, 33}, {33, 4163, 3}, {49, 127, 49}, {17, 8260, 3}, {290, 70, 35}, {16, 64, 0}})
    CheckInt8(M, K, N);
  for (auto [M, K, N, group] : std::vector<std::array<int64_t, 4>>{
           {1, 128, 5, 128}, {7, 256, 7, 32}, {4, 512, 9, 16}, {3, 384, 6, 384}, {6, 1024, 5, 256},
           {9, 102, 3, 102}, {3, 576, 9, 64}, {2, 576, 5, 96}, {1, 120, 1, 24}, {1, 6, 1, 6}, {18, 4232, 67, 184},
           {16, 64, 33, 32}, {33, 288, 35, 96}, {50, 200, 17, 40}, {17, 4482, 3, 4482},
           {270, 64, 18, 32}})
    for (int bits : {4, 8})
      for (auto type : {Weights::kFloat32, Weights::kFloat16, Weights::kBFloat16})
        if (type == Weights::kFloat32 || M <= 7)
          for (bool has_zero : {false, true}) CheckGroups(M, K, N, group, bits, has_zero, type);
  for (int64_t columns : {18, 1002})
    for (int i = 0; i < 16; ++i)
      CheckUpdate(i & 1 ? 2 : 4, i & 2 ? 4 : 8, i & 4, i & 8, columns);
  for (int type : {0, 1, 2, 3, 4})
    for (auto [B, T, H, G, S, D] : std::vector<std::array<int64_t, 6>>{
             {2, 1, 2, 3, 67, 64}, {1, 70, 1, 2, 131, 33}, {3, 2, 2, 1, 5, 5}, {1, 9, 2, 5, 300, 80}, {1, 1, 1, 3, 1100, 20}}) {
      Attention a{};
      a.type = static_cast<Attention::Type>(type);
      a.B = B, a.T = T, a.H = H, a.G = G, a.S = S, a.D = D;
      std::vector<int32_t> starts(B);
      for (int64_t b = 0; b < B; ++b) starts[b] = std::max<int64_t>(0, S - T - 17 * b);
      CheckAttention(a, starts);
    }
  return wrong > 0;
}
