// Tiles in C++, by the pseudocode of Intel's manual, with a check for each condition that faults there.
// tiles.h includes it where JAXQUANT_TILES names it.

#include <cmath>
#include <cstdio>
#include <cstdlib>

namespace jaxquant {

struct Tiles {
  static bool IsSupported() { return true; }

  static void Configure(const TileShapes& shapes) {
    Require(shapes.palette == 1 && shapes.start == 0, "palette");
    for (uint8_t byte : shapes.unused) Require(byte == 0, "reserved bytes");
    for (int t = 0; t < 16; ++t) {
      Require(shapes.rows[t] <= (t < 8 ? 16 : 0) && shapes.bytes[t] <= (t < 8 ? 64 : 0), "shape");
      Require((shapes.rows[t] == 0) == (shapes.bytes[t] == 0), "tile without rows or bytes");
    }
    State() = {shapes, {}, true};
  }
  static void Release() { State() = {}; }

  template <int tile>
  static void Zero() {
    Tile<tile>() = {};
  }
  template <int tile>
  static void Load(const void* from, int64_t stride) {
    Tile<tile>() = {};
    for (int r = 0; r < Rows(tile); ++r)
      std::memcpy(Tile<tile>().row[r], static_cast<const uint8_t*>(from) + r * stride, Bytes(tile));
  }
  template <int tile>
  static void Store(void* to, int64_t stride) {
    for (int r = 0; r < Rows(tile); ++r)
      std::memcpy(static_cast<uint8_t*>(to) + r * stride, Tile<tile>().row[r], Bytes(tile));
  }

  template <int sums, int a, int b>
  static void DotBytes() {
    CheckShapes<sums, a, b>();
    for (int m = 0; m < Rows(sums); ++m)
      for (int k = 0; k < Rows(b); ++k)
        for (int n = 0; n < Bytes(sums) / 4; ++n) {
          uint32_t sum = Get<uint32_t>(Tile<sums>(), m, n);
          for (int i = 0; i < 4; ++i)
            sum += Get<int8_t>(Tile<a>(), m, 4 * k + i) * Get<int8_t>(Tile<b>(), k, 4 * n + i);
          Set(Tile<sums>(), m, n, sum);
        }
    ZeroBeyond<sums>();
  }

  template <int sums, int a, int b>
  static void DotHalves() {
    CheckShapes<sums, a, b>();
    for (int m = 0; m < Rows(sums); ++m) {
      float pairs[16][2] = {};
      for (int k = 0; k < Rows(b); ++k)
        for (int n = 0; n < Bytes(sums) / 4; ++n)
          for (int i = 0; i < 2; ++i)
            pairs[n][i] = Flushed(std::fma(Half(Tile<a>(), m, 2 * k + i),
                                           Half(Tile<b>(), k, 2 * n + i), pairs[n][i]));
      for (int n = 0; n < Bytes(sums) / 4; ++n) {
        const float sum = Flushed(pairs[n][0] + pairs[n][1]);
        Set(Tile<sums>(), m, n, Flushed(Flushed(Get<float>(Tile<sums>(), m, n)) + sum));
      }
    }
    ZeroBeyond<sums>();
  }

 private:
  struct TileData {
    uint8_t row[16][64];
  };
  // What a thread's registers hold.
  struct Registers {
    TileShapes shapes;
    TileData tiles[8];
    bool is_configured;
  };
  static Registers& State() {
    static thread_local Registers registers{};
    return registers;
  }

  static void Require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "a tile instruction would fault: %s\n", what);
    std::abort();
  }
  static int Rows(int tile) { return State().shapes.rows[tile]; }
  static int Bytes(int tile) { return State().shapes.bytes[tile]; }
  template <int tile>
  static TileData& Tile() {
    static_assert(0 <= tile && tile < 8);
    Require(State().is_configured && Rows(tile) > 0 && Bytes(tile) % 4 == 0, "shape of a tile");
    return State().tiles[tile];
  }
  template <int sums, int a, int b>
  static void CheckShapes() {
    static_assert(sums != a && sums != b && a != b);
    Require(Rows(sums) == Rows(a) && Bytes(sums) == Bytes(b) && Bytes(a) == 4 * Rows(b),
            "shapes that do not fit");
  }
  // Dot products write whole registers.
  template <int tile>
  static void ZeroBeyond() {
    for (int r = 0; r < 16; ++r)
      for (int i = r < Rows(tile) ? Bytes(tile) : 0; i < 64; ++i) Tile<tile>().row[r][i] = 0;
  }

  template <typename T>
  static T Get(const TileData& tile, int row, int i) {
    T value;
    std::memcpy(&value, tile.row[row] + i * sizeof(T), sizeof(T));
    return value;
  }
  template <typename T>
  static void Set(TileData& tile, int row, int i, T value) {
    std::memcpy(tile.row[row] + i * sizeof(T), &value, sizeof(T));
  }
  // Subnormals are zero, whatever the thread does with them.
  static float Flushed(float x) {
    return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
  }
  static float Half(const TileData& tile, int row, int i) {
    const uint32_t bits = uint32_t{Get<uint16_t>(tile, row, i)} << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return Flushed(x);
  }
};

}  // namespace jaxquant
