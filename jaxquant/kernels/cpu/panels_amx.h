// Products of many rows with AMX. Included by avx512.cc within its namespace, after panels_avx512.h.
//
// A tile of weights is 16 rows of them by 64 bytes along K, a step. Activations are rearranged into
// panels of two tiles, each of 16 rows of activations, so that the tile of a step holds 16 lines with 4
// bytes of each row. Two tiles of weights by a panel give a block of sums, in tiles of 16 columns of the
// result by 16 of its rows, which are transposed when they are complete. Steps have 32 bytes in groups of
// as many. Few panels multiply 8-bit weights as they are stored; for more, as for 4-bit weights, tiles are
// copied: rows lie on many pages.

constexpr int64_t kTile = 16, kStep = 64;
// Tiles of a panel, and of weights in a block.
constexpr int64_t kPair = 2;
// Rows from which tiles multiply, and elements of a group: each group costs a scaled addition.
constexpr int64_t kTiledRows = 16, kTiledGroup = 32;
// Panels up to which 8-bit weights are multiplied as they are stored.
constexpr int64_t kStoredPanels = 8;
// Steps for which a panel and two tiles of weights stay in the L2 cache, and bytes of weights that do.
constexpr int64_t kStepsInCache = 128, kBytesInCache = 1 << 20;

// How rows are divided along K: into parts, and those into steps, the last of which may be shorter.
struct Steps {
  int64_t width = kStep;       // of a step in bytes, or half of that
  std::vector<int64_t> at;     // where they start in a row, in bytes, and the end of the row
  std::vector<int64_t> first;  // of each part, and the number of steps

  explicit Steps(const std::vector<int64_t>& parts, bool is_half = false)
      : width(is_half ? kStep / 2 : kStep) {
    for (size_t p = 0; p + 1 < parts.size(); ++p) {
      first.push_back(at.size());
      for (int64_t k = parts[p]; k < parts[p + 1]; k += width) at.push_back(k);
    }
    first.push_back(at.size()), at.push_back(parts.back());
  }
  int64_t count() const { return first.back(); }
  int64_t parts() const { return first.size() - 1; }
  // Of a tile of activations at one step, and bytes of a tile of weights.
  int64_t lines() const { return width / 4; }
  int64_t bytes() const { return kTile * width; }
  // A step of a row, and zeros beyond it.
  Bytes Load(const uint8_t* row, int64_t s) const {
    const int64_t bytes = at[s + 1] - at[s];
    return bytes == kStep ? LoadBytes(row + at[s]) : LoadPart(row + at[s], bytes);
  }
  void Store(uint8_t* to, Bytes step) const {
    if (width == kStep) return _mm512_store_si512(to, step);
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(step));
  }
};

// Panels of activations. Beyond the rows and beyond each part along K are zeros, so what weights have
// there does not count.
struct Panels {
  const Steps& steps;
  int64_t M, tiles;
  std::unique_ptr<CacheLine[]> lines;

  Panels(ThreadPool& pool, const void* x, int64_t M, const Steps& steps)
      : steps(steps), M(M), tiles((M + kTile - 1) / kTile),
        lines(new CacheLine[tiles * steps.count() * steps.lines()]) {
    const int64_t bytes = steps.at.back(), least = 1 + (1 << 15) / (kTile * bytes);
    Parallel(pool, tiles, least, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t s = 0; s < steps.count(); ++s) {
          Ints rows[kTile];
          for (int64_t i = 0; i < kTile; ++i) {
            const int64_t m = t * kTile + i;
            rows[i] = m < M ? steps.Load(static_cast<const uint8_t*>(x) + m * bytes, s) : ZeroInts();
          }
          Transpose(rows);
          CacheLine* to = lines.get() + Offset(t / kPair, s) + t % kPair * steps.lines();
          for (int64_t i = 0; i < steps.lines(); ++i) _mm512_store_si512(to + i, rows[i]);
        }
    });
  }

  int64_t count() const { return (tiles + kPair - 1) / kPair; }
  int64_t width(int64_t panel) const { return std::min(kPair, tiles - panel * kPair); }
  // The tiles of a panel at one step; those at the next one follow.
  const CacheLine* At(int64_t panel, int64_t s) const { return lines.get() + Offset(panel, s); }

 private:
  int64_t Offset(int64_t panel, int64_t s) const {
    return (panel * kPair * steps.count() + s * width(panel)) * steps.lines();
  }
};

// A tile of weights at one step.
struct WeightTile {
  const uint8_t* at;
  int64_t stride, step;  // from one row to the next, and from one step to the next
};

// 8-bit weights as they are stored, but for the last tiles: tiles read up to a step beyond a row.
struct StoredTiles {
  const Weights& w;
  const Steps& steps;
  int64_t stored;  // number of those
  std::vector<CacheLine> copy;

  StoredTiles(const Weights& w, const Steps& steps)
      : w(w), steps(steps), stored(std::max<int64_t>(0, w.N * w.K - kStep) / (kTile * w.K)),
        copy(((w.N + kTile - 1) / kTile - stored) * steps.count() * kTile) {
    CacheLine* to = copy.data();
    for (int64_t n = stored * kTile; n < w.N; n += kTile)
      for (int64_t s = 0; s < steps.count(); ++s)
        for (int64_t i = 0; i < kTile; ++i, ++to)
          _mm512_store_si512(to, steps.Load(w.at(std::min(n + i, w.N - 1), 0), s));
  }
  const StoredTiles& Block(int64_t, int64_t) const { return *this; }
  WeightTile At(int64_t t, int64_t s) const {
    if (t < stored) return {w.at(t * kTile, steps.at[s]), w.K, steps.width};
    return {copy[((t - stored) * steps.count() + s) * kTile].bytes, kStep, kTile * kStep};
  }
};

// Weights of which each block is copied into the cache: `fill(n, s, to)` copies a step of row n.
template <typename Fill>
struct CopiedTiles {
  int64_t N;
  const Steps& steps;
  Fill fill;

  struct Copy {
    const uint8_t* tiles;
    int64_t first;
    const Steps& steps;
    WeightTile At(int64_t t, int64_t s) const {
      return {tiles + ((t - first) * steps.count() + s) * steps.bytes(), steps.width, steps.bytes()};
    }
  };
  Copy Block(int64_t first, int64_t last) const {
    auto* tiles = Scratch<uint8_t>(0, (last - first) * steps.count() * steps.bytes());
    for (int64_t t = first; t < last; ++t)
      for (int64_t i = 0; i < kTile; ++i) {
        const int64_t n = std::min(t * kTile + i, N - 1);
        uint8_t* to = tiles + (t - first) * steps.count() * steps.bytes() + i * steps.width;
        for (int64_t s = 0; s < steps.count(); ++s, to += steps.bytes()) fill(n, s, to);
      }
    return {tiles, first, steps};
  }
};

// Sums of a block, in int32 or float32.
template <typename T>
struct alignas(64) BlockSums {
  T at[kPair][kPair][kTile][kTile];  // tiles of weights, tiles of activations, columns by rows

  template <int W, int V>
  void ToTiles() const {
    Tiles::Load<0>(at[0][0], kStep);
    if constexpr (V > 1) Tiles::Load<1>(at[0][1], kStep);
    if constexpr (W > 1) Tiles::Load<2>(at[1][0], kStep);
    if constexpr (W > 1 && V > 1) Tiles::Load<3>(at[1][1], kStep);
  }
  template <int W, int V>
  void FromTiles() {
    Tiles::Store<0>(at[0][0], kStep);
    if constexpr (V > 1) Tiles::Store<1>(at[0][1], kStep);
    if constexpr (W > 1) Tiles::Store<2>(at[1][0], kStep);
    if constexpr (W > 1 && V > 1) Tiles::Store<3>(at[1][1], kStep);
  }
};

inline void ZeroTiles() { Tiles::Zero<0>(), Tiles::Zero<1>(), Tiles::Zero<2>(), Tiles::Zero<3>(); }

template <typename T, int sums, int weights, int x>
inline void DotTiles() {
  if constexpr (std::is_integral_v<T>) Tiles::DotBytes<sums, weights, x>();
  else Tiles::DotHalves<sums, weights, x>();
}

// Adds the products of some steps of W tiles of weights by V tiles of activations to the sums in tiles
// 0 to 3.
template <typename T, int W, int V>
inline void AddSteps(WeightTile w, WeightTile next, const CacheLine* x, int64_t steps) {
  for (; steps > 0; --steps, w.at += w.step, next.at += next.step, x += V * kTile) {
    Tiles::Load<4>(w.at, w.stride);
    Tiles::Load<5>(x, kStep), DotTiles<T, 0, 4, 5>();
    if constexpr (V > 1) Tiles::Load<6>(x + kTile, kStep), DotTiles<T, 1, 4, 6>();
    if constexpr (W > 1) Tiles::Load<7>(next.at, next.stride), DotTiles<T, 2, 7, 5>();
    if constexpr (W > 1 && V > 1) DotTiles<T, 3, 7, 6>();
  }
}

// Stores the results of a tile, of 16 columns by the rows m to M or 16 of them. Out of line, because GCC
// would keep the address of each row in a register.
template <typename T>
NOINLINE void PutTile(const Result& out, const T (&sums)[kTile][kTile], int64_t m, int64_t M,
                      int64_t n) {
  Ints rows[kTile];
  UNROLLED(i, kTile) rows[i] = LoadBytes(sums[i]);
  Transpose(rows);
  const Result to = out;
  const int64_t count = std::min(kTile, M - m);
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (std::is_integral_v<T>) Put(to, m + i, n, rows[i]);
    else Put(to, m + i, n, _mm512_castsi512_ps(rows[i]));
  }
}

// Stores the results of a block.
template <int W, int V, typename T>
inline void PutBlock(const Result& out, const BlockSums<T>& sums, int64_t m, int64_t M, int64_t n) {
  for (int w = 0; w < W; ++w)
    for (int v = 0; v < V; ++v)
      PutTile(out, sums.at[w][v], m + v * kTile, M, n + w * kTile);
}

// Products that are complete when all steps are added, in parts that stay in the cache.
template <typename T>
struct PlainTiles {
  const Panels& x;
  const Result& out;

  // W tiles of weights, from t on, by a panel of V tiles.
  template <int W, int V, typename Block>
  void Multiply(const Block& weights, int64_t t, int64_t panel) const {
    BlockSums<T> sums;
    const int64_t count = x.steps.count();
    for (int64_t s = 0; s < count; s += kStepsInCache) {
      if (s) sums.template ToTiles<W, V>();
      else ZeroTiles();
      AddSteps<T, W, V>(weights.At(t, s), weights.At(t + W - 1, s), x.At(panel, s),
                        std::min(kStepsInCache, count - s));
      sums.template FromTiles<W, V>();
    }
    PutBlock<W, V>(out, sums, panel * kPair * kTile, x.M, t * kTile);
  }
};

// Products in groups. The sum of a part of a group is exact.
struct GroupTiles {
  const Panels& x;
  const Result& out;
  const Weights& w;
  std::vector<int64_t> groups;  // of each part
  std::vector<float> activations;  // sums of them, (parts, rows of all tiles), if there are zero points

  template <int W, int V, typename Block>
  void Multiply(const Block& weights, int64_t t, int64_t panel) const {
    for (int i = 0; i < W; ++i)
      for (int v = 0; v < V; ++v) MultiplyTile<V>(weights, t + i, panel, v);
  }

  // One tile of weights by one of a panel: registers hold as many sums.
  template <int V, typename Block>
  NOINLINE void MultiplyTile(const Block& weights, int64_t t, int64_t panel, int v) const {
    alignas(64) int32_t sums[kTile][kTile];
    Floats total[kTile];
    UNROLLED(i, kTile) total[i] = Broadcast(0);
    const int64_t n = t * kTile, row = (panel * kPair + v) * kTile;
    for (int64_t p = 0; p < x.steps.parts(); ++p) {
      const int64_t first = x.steps.first[p], count = x.steps.first[p + 1] - first;
      WeightTile tile = weights.At(t, first);
      const CacheLine* with = x.At(panel, first) + v * x.steps.lines();
      Tiles::Zero<0>();
      for (int64_t s = 0; s < count; ++s, tile.at += tile.step, with += V * x.steps.lines()) {
        Tiles::Load<4>(tile.at, tile.stride), Tiles::Load<5>(with, kStep);
        Tiles::DotBytes<0, 4, 5>();
      }
      Tiles::Store<0>(sums, kStep);
      const float* scale = w.scales() + n * w.G + groups[p];
      const float* zero = w.zero ? w.zero + n * w.G + groups[p] : nullptr;
      const Floats inputs = zero ? Load(&activations[p * x.tiles * kTile + row]) : Broadcast(0);
      const int64_t last = w.N - 1 - n;
      UNROLLED(i, kTile) {
        const int64_t at = std::min<int64_t>(i, last) * w.G;
        Floats sum = ToFloats(LoadBytes(sums[i]));
        if (zero) sum = NegMulAdd(Broadcast(zero[at]), inputs, sum);
        total[i] = MulAdd(sum, Broadcast(scale[at]), total[i]);
      }
    }
    alignas(64) float results[kTile][kTile];
    UNROLLED(i, kTile) Store(results[i], total[i]);
    PutTile(out, results, row, x.M, n);
  }
};

// Calls products.Multiply for all panels by blocks of weights, which threads share. If there are few
// blocks, they share the panels of each.
template <typename Products, typename Tiled>
void MultiplyTiles(ThreadPool& pool, const Products& products, const Tiled& weights, int64_t N) {
  if (N == 0) return;
  const Panels& x = products.x;
  const int64_t threads = Threads(pool), tiles = (N + kTile - 1) / kTile;
  const int64_t in_cache = kBytesInCache / (kPair * x.steps.count() * x.steps.bytes());
  const int64_t wanted = tiles / (4 * kPair * threads);
  const int64_t size = kPair * std::max<int64_t>(1, std::min(in_cache, wanted));
  const int64_t blocks = (tiles + size - 1) / size;
  const int64_t most = std::min(x.count(), std::max<int64_t>(1, 4 * threads / blocks));
  const int64_t width = (x.count() + most - 1) / most, parts = (x.count() + width - 1) / width;
  Parallel(pool, blocks * parts, 1, 1, [&](int64_t begin, int64_t end) {
    TileShapes shapes;
    for (int t = 0; t < 8; ++t) shapes.rows[t] = kTile, shapes.bytes[t] = kStep;
    if (x.steps.width < kStep) shapes.bytes[4] = x.steps.width, shapes.rows[5] = x.steps.lines();
    Tiles::Configure(shapes);
    for (int64_t at = begin, count; at < end; at += count) {
      const int64_t part = at % parts, first = at / parts * size, last = std::min(first + size, tiles);
      count = std::min(parts - part, end - at);
      const auto& block = weights.Block(first, last);
      for (int64_t p = part * width; p < std::min((part + count) * width, x.count()); ++p)
        for (int64_t t = first; t < last; t += kPair) {
          const bool is_pair = last - t > 1;
          if (x.width(p) > 1 && is_pair) products.template Multiply<2, 2>(block, t, p);
          else if (x.width(p) > 1) products.template Multiply<1, 2>(block, t, p);
          else if (is_pair) products.template Multiply<2, 1>(block, t, p);
          else products.template Multiply<1, 1>(block, t, p);
        }
    }
    Tiles::Release();
  });
}

// 8-bit weights.
template <typename Products>
void MultiplyBytes(ThreadPool& pool, const Products& products, const Weights& w) {
  const Steps& steps = products.x.steps;
  if (products.x.count() <= kStoredPanels)
    return MultiplyTiles(pool, products, StoredTiles(w, steps), w.N);
  const auto fill = [&](int64_t n, int64_t s, uint8_t* to) {
    steps.Store(to, steps.Load(w.at(n, 0), s));
  };
  MultiplyTiles(pool, products, CopiedTiles<decltype(fill)>{w.N, steps, fill}, w.N);
}

void TileInt8(ThreadPool& pool, const int8_t* x, int64_t M, const Weights& w, const Result& out) {
  if (M < kTiledRows || w.K == 0) return DotInt8(pool, x, M, w, out);
  const Steps steps({0, w.K});
  const Panels panels(pool, x, M, steps);
  MultiplyBytes(pool, PlainTiles<int32_t>{panels, out}, w);
}

void TileGroups(ThreadPool& pool, const int8_t* x, int64_t M, const Weights& w, const Result& out) {
  if (M < kTiledRows || w.group() < kTiledGroup || w.K == 0) return DotGroups(pool, x, M, w, out);
  const std::vector<int64_t> parts = Parts(w);
  const Steps steps(parts, w.group() == kStep / 2);
  const Panels panels(pool, x, M, steps);
  GroupTiles products{panels, out, w, {}, {}};
  for (int64_t p = 0; p < steps.parts(); ++p) {
    products.groups.push_back(parts[p] / w.group());
    if (!w.zero) continue;
    for (int64_t m = 0; m < panels.tiles * kTile; ++m)
      products.activations.push_back(
          m < M ? SumOf(x + m * w.K + parts[p], parts[p + 1] - parts[p]) : 0);
  }
  if (w.bits == 8) return MultiplyBytes(pool, products, w);
  const auto fill = [&](int64_t n, int64_t s, uint8_t* to) {
    const int64_t k = steps.at[s], pairs = (steps.at[s + 1] - k) / 2;
    const auto within = static_cast<__mmask32>((uint64_t{1} << pairs) - 1);
    Bytes wide = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(within, w.at(n, k)));
    Bytes plus8 = Low(Xor(_mm512_or_si512(wide, _mm512_slli_epi16(wide, 4)), 8));
    steps.Store(to, _mm512_sub_epi8(plus8, _mm512_set1_epi8(8)));
  };
  MultiplyTiles(pool, products, CopiedTiles<decltype(fill)>{w.N, steps, fill}, w.N);
}
