// Compares the kernels of one instruction set with plain loops, for emulators and sanitizers: without
// XLA, on one thread. SOURCE is the file of the instruction set, KERNELS its table.

#include <array>
#include <cmath>
#include <cstdio>
#include <random>

#include SOURCE

using namespace jaxquant;

void jaxquant::Parallel(ThreadPool&, int64_t count, int64_t, int64_t,
                        std::function<void(int64_t, int64_t)> work) {
  work(0, count);
}

char no_threads;
ThreadPool& pool = reinterpret_cast<ThreadPool&>(no_threads);

int wrong = 0;

void Expect(double found, double wanted, double tolerance, const char* kernel) {
  if (std::fabs(found - wanted) <= tolerance) return;
  if (wrong++ < 5) std::printf("%s: got %g, wanted %g\n", kernel, found, wanted);
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
  KERNELS.dot_int8(pool, x.data(), M, weights, {ints.data(), N, Result::kInt32});
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

void CheckGroups(int64_t M, int64_t K, int64_t N, int64_t group, int bits) {
  std::mt19937 random(1);
  const int64_t G = K / group;
  std::vector<int8_t> x(M * K);
  std::vector<uint8_t> w(N * K * bits / 8);
  std::vector<float> real(M * K), scale(N * G), zero(N * G), table(16), floats(M * N), sums(M * N);
  for (auto& v : x) v = random();
  for (auto& v : w) v = random();
  for (auto& v : real) v = static_cast<int>(random() % 1000) / 500.f - 1;
  for (auto& v : scale) v = 1 + (random() % 100) / 100.f;
  for (auto& v : zero) v = static_cast<int>(random() % 16) - 8;
  for (int i = 0; i < 16; ++i) table[i] = (i ^ 8) - 8;

  Weights weights{w.data(), N, K, bits, scale.data(), zero.data(), G};
  std::vector<float> row(M, 0.5f);
  const bool is_widened = bits == 8 && (G == 1 || group % 16 == 0);
  Result halved{floats.data(), N, Result::kFloat32, row.data()};
  KERNELS.dot_groups(pool, x.data(), M, weights, halved);
  if (bits == 4) KERNELS.dot_lookup(pool, real.data(), M, weights, table.data(), sums.data());
  else if (is_widened) KERNELS.dot_widen(pool, real.data(), M, weights, sums.data());
  for (int64_t i = 0; i < M * N; ++i) {
    const int64_t m = i / N, n = i % N;
    double by_codes = 0, by_floats = 0;
    for (int64_t k = 0; k < K; ++k) {
      const int nibble = w[(n * K + k) * bits / 8] >> (4 * (k % 2)) & 15;
      const int code = bits == 4 ? (nibble ^ 8) - 8 : static_cast<int8_t>(w[n * K + k]);
      const int64_t at = n * G + k / group;
      const double value = (code - zero[at]) * static_cast<double>(scale[at]);
      by_codes += x[m * K + k] * value;
      by_floats += real[m * K + k] * value;
    }
    Expect(floats[i], by_codes / 2, bits * 0.02 * std::sqrt(K), "int8 by groups");
    if (bits == 4 || is_widened) Expect(sums[i], by_floats, bits * 1e-3 * std::sqrt(K), "float by groups");
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
           {1, 128, 5}, {7, 256, 7}, {5, 203, 6}, {3, 1, 1}, {18, 101, 67}})
    CheckInt8(M, K, N);
  for (auto [M, K, N, group] : std::vector<std::array<int64_t, 4>>{
           {1, 128, 5, 128}, {7, 256, 7, 32}, {4, 512, 9, 16}, {3, 384, 6, 384}, {6, 1024, 5, 256},
           {9, 102, 3, 102}, {2, 576, 5, 96}, {1, 120, 1, 24}, {1, 6, 1, 6}, {18, 4232, 67, 184}})
    CheckGroups(M, K, N, group, 4), CheckGroups(M, K, N, group, 8);
  return wrong > 0;
}
