// Compares the NEON kernels with plain loops, for emulators: without XLA, on one thread.

#include "../../jaxquant/kernels/cpu.cc"

#include <array>
#include <cmath>
#include <cstdio>
#include <random>

using namespace neon;

int wrong = 0;

void Expect(double found, double wanted, double tolerance, const char* kernel) {
  if (std::fabs(found - wanted) <= tolerance) return;
  if (wrong++ < 5) std::printf("%s: got %g, wanted %g\n", kernel, found, wanted);
}

template <typename Kernel>
void Run(int64_t M, int64_t N, const Kernel& kernel) {
  int64_t m = 0;
  for (; m + kRows <= M; m += kRows) Columns<kRows>(kernel, m, 0, N);
  for (; m + 3 <= M; m += 3) Columns<3>(kernel, m, 0, N);
  for (; m + 2 <= M; m += 2) Columns<2>(kernel, m, 0, N);
  for (; m < M; ++m) Columns<1>(kernel, m, 0, N);
}

void Check(int64_t M, int64_t K, int64_t N, int64_t group) {
  std::mt19937 random(1);
  const int64_t G = K / group;
  std::vector<int8_t> x(M * K), w(N * K);
  std::vector<float> real(M * K), scale(N * G), zero(N * G), table(16), floats(M * N), sums(M * N);
  std::vector<int32_t> ints(M * N);
  for (auto& v : x) v = random();
  for (auto& v : w) v = random();
  for (auto& v : real) v = static_cast<int>(random() % 1000) / 500.f - 1;
  for (auto& v : scale) v = 1 + (random() % 100) / 100.f;
  for (auto& v : zero) v = static_cast<int>(random() % 16) - 8;
  for (int i = 0; i < 16; ++i) table[i] = (i ^ 8) - 8;

  std::vector<int32_t> total = SumsOf<int32_t>(x.data(), M, K);
  Weights bytes{reinterpret_cast<const uint8_t*>(w.data()), N, K, 8};
  Run(M, N, Int8ByInt8{x.data(), total.data(), bytes, {ints.data(), N, Result::kInt32}});
  Run(M, N, FloatByInt8{real.data(), bytes, floats.data()});
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

  if (K % kBlock) return;  // Only bytes may leave a rest.
  Weights nibbles{bytes.codes, N, K, 4, scale.data(), zero.data(), G};
  std::vector<int8_t> arranged = EvensThenOdds(x.data(), M * K, kBlock);
  std::vector<float> eights = SumsOf<float>(x.data(), M * K / 8, 8);
  std::vector<float> pairs = EvensThenOdds(real.data(), M * K, 2 * kLanes);
  auto quarter = [&](int i) { return OfLanes(2 * kLanes * i, 2, group); };
  std::vector<float> row(M, 0.5f);
  Result halved{floats.data(), N, Result::kFloat32, row.data()};
  Run(M, N, Int8ByInt4{arranged.data(), eights.data(), nibbles, halved, OfLanes(0, 8, group)});
  Run(M, N, FloatByTable{pairs.data(), nibbles, table.data(), sums.data(),
                         {quarter(0), quarter(1), quarter(2), quarter(3)}});
  for (int64_t i = 0; i < M * N; ++i) {
    const int64_t m = i / N, n = i % N;
    double by_codes = 0, by_floats = 0;
    for (int64_t k = 0; k < K; ++k) {
      const int bits = (bytes.codes[(n * K + k) / 2] >> (4 * (k % 2))) & 15;
      const int64_t at = n * G + k / group;
      const double value = ((bits ^ 8) - 8 - zero[at]) * static_cast<double>(scale[at]);
      by_codes += x[m * K + k] * value;
      by_floats += real[m * K + k] * value;
    }
    Expect(floats[i], by_codes / 2, 0.05 * std::sqrt(K), "int8 by int4");
    Expect(sums[i], by_floats, 2e-3 * std::sqrt(K), "float by table");
  }
}

void CheckRow(int64_t K, float size) {
  std::vector<float> x(K);
  std::mt19937 random(2);
  for (auto& v : x) v = (static_cast<int>(random() % 255) / 2.f - 63.5f) * size;
  x[K / 2] = 127 * size;
  std::vector<int8_t> codes(K);
  float scale = ScaleOf(x.data(), K, 127);
  CodesOf(x.data(), K, 1 / scale, -127, 100, codes.data());
  Expect(scale / size, 1, 1e-6, "scale");
  for (int64_t k = 0; k < K; ++k)
    Expect(codes[k], std::fmin(std::nearbyint(x[k] * (1 / scale)), 100), 0, "codes");
  x[K / 3] = NAN;
  Expect(std::isnan(ScaleOf(x.data(), K, 127)), 1, 0, "scale of NaN");
}

// Subnormals are zero on threads that keep them, too. XLA's, which tests call, keep none.
void CheckSubnormals() {
  const float x[2] = {130 * 0x1p-126f, 0x1.8p-127f};
  int8_t codes[2];
  CodesOf(x, 2, 1 / ScaleOf(x, 2, 127), -127, 127, codes);
  Expect(codes[0], 127, 0, "code of the largest");
  Expect(codes[1], 0, 0, "code of a subnormal");
}

int main() {
  CheckSubnormals();
  for (int64_t K : {3, 64, 101}) CheckRow(K, 1), CheckRow(K, 1e-36f), CheckRow(K, 1e30f);
  for (auto [M, K, N, group] : std::vector<std::array<int64_t, 4>>{
           {1, 128, 5, 128}, {7, 256, 7, 32}, {4, 512, 9, 16}, {3, 384, 6, 384}, {6, 1024, 5, 256}, {5, 203, 6, 203}})
    Check(M, K, N, group);
  return wrong > 0;
}
