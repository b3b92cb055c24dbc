// Products of many float rows of activations, with AVX512. Included by avx512.cc within its namespace,
// after panels_avx512.h: the panels are of floats.

// Elements along K for which a panel of floats stays in the L2 cache.
constexpr int64_t kFloatDepth = 512;
// Pieces of a float product for each thread, if they have so many rows.
constexpr int64_t kPieces = 8, kRowsOfPiece = 96;

// The scales or zero points of 16 columns, starting at n, one group after another: 16 groups are loaded
// and transposed at once.
struct ByGroup {
  const Weights& w;
  const float* values;
  int64_t n, first = -kLanes;
  Ints groups[16] = {};

  Floats operator()(int64_t group) {
    if (group >= first + kLanes) {
      first = group;
      const int64_t count = std::min(kLanes, w.G - group);
      for (int64_t i = 0; i < kLanes; ++i) {
        const float* from = values + std::min(n + i, w.N - 1) * w.G + group;
        groups[i] = count == kLanes ? LoadBytes(from) : LoadPart(from, 4 * count);
      }
      Transpose(groups);
    }
    return _mm512_castsi512_ps(groups[group - first]);
  }
};

// Lanes of 32 bits, for shifts by constants.
typedef uint32_t Unsigned32 __attribute__((vector_size(64)));
typedef int32_t Signed32 __attribute__((vector_size(64)));

// How codes become values: those of kBits bits, of which the others in each lane are above.
struct Lookup {
  static constexpr int kBits = 4;
  const Table table;
  Floats operator()(Ints lane, int j) const { return table[(Ints)((Unsigned32)lane >> (4 * j))]; }
};
struct Widened {
  static constexpr int kBits = 8;
  Floats operator()(Ints lane, int j) const {
    return ToFloats((Ints)((Signed32)((Unsigned32)lane << (24 - 8 * j)) >> 24));
  }
};

// Fills vectors of a panel with the floats (code - zero) * scale of elements k to end.
template <typename Values>
void PackFloats(const Weights& w, const Values& values, int64_t n, int64_t k, int64_t end,
                int vectors, float* panel) {
  constexpr int kCodes = 32 / Values::kBits;  // of one column in a lane
  for (int v = 0; v < vectors; ++v) {
    const int64_t column = n + v * kLanes;
    ByGroup scales{w, w.scales(), column}, zeros{w, w.zero, column};
    int64_t next = 0;  // where the next group starts
    Floats step = Broadcast(1), zero = Broadcast(0);
    for (int64_t from = k; from < end; from += 16 * kCodes) {
      Ints words[16];
      const int64_t bytes = (w.K - from) * Values::kBits / 8;
      for (int64_t i = 0; i < kLanes; ++i) {
        const uint8_t* row = w.at(std::min(column + i, w.N - 1), from);
        words[i] = bytes >= kBytes ? LoadBytes(row) : LoadPart(row, bytes);
        Prefetch(row + 4 * kBytes);
      }
      Transpose(words);
      const int64_t last = std::min<int64_t>(from + 16 * kCodes, end);
      for (int64_t at = from; at < last; at += kCodes) {
        const Ints word = words[(at - from) / kCodes];
        float* to = panel + (at - k) * kPanel + v * kLanes;
        UNROLLED(j, kCodes) {
          if (at + j >= last) break;
          if (at + j >= next) {
            const int64_t group = (at + j) / w.group();
            next = (group + 1) * w.group();
            if (w.scale) step = scales(group);
            if (w.zero) zero = zeros(group);
          }
          Floats value = values(word, j);
          if (w.zero) value = Sub(value, zero);
          _mm512_store_ps(to + j * kPanel, Mul(value, step));
        }
      }
    }
  }
}

// Sums over a part of K, added to those of earlier parts, for V vectors of columns.
template <int V>
struct FloatTile {
  const float* x;
  const float* panel;
  int64_t first, count, K, N, n;
  float* out;

  template <int R>
  void Run(int64_t m) const {
    Floats acc[R][V];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v)
        acc[r][v] = first ? _mm512_maskz_loadu_ps(ColumnMask(N, n + v * kLanes),
                                                  out + (m + r) * N + n + v * kLanes)
                          : Broadcast(0);
    const float *in = x + m * K + first, *weights = panel;
    for (int64_t k = 0; k < count; ++k, ++in, weights += kPanel) {
      Floats w[V];
      for (int v = 0; v < V; ++v) w[v] = _mm512_load_ps(weights + v * kLanes);
      for (int r = 0; r < R; ++r) {
        const Floats value = Broadcast(in[r * K]);
        for (int v = 0; v < V; ++v) acc[r][v] = MulAdd(w[v], value, acc[r][v]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v)
        _mm512_mask_storeu_ps(out + (m + r) * N + n + v * kLanes, ColumnMask(N, n + v * kLanes),
                              acc[r][v]);
  }
};

// The rows `begin` to `end` by the columns of one panel.
template <typename Values>
void OnePanel(const float* x, int64_t begin, int64_t end, const Weights& w, const Values& values,
              int64_t n, float* panel, float* out) {
  const int vectors = std::min<int64_t>(kVectors, (w.N - n + kLanes - 1) / kLanes);
  for (int64_t k = 0; k < w.K; k += kFloatDepth) {
    const int64_t last = std::min(k + kFloatDepth, w.K), count = last - k;
    PackFloats(w, values, n, k, last, vectors, panel);
    if (vectors == 4) ForRows(begin, end, FloatTile<4>{x, panel, k, count, w.K, w.N, n, out});
    if (vectors == 3) ForRows(begin, end, FloatTile<3>{x, panel, k, count, w.K, w.N, n, out});
    if (vectors == 2) ForRows(begin, end, FloatTile<2>{x, panel, k, count, w.K, w.N, n, out});
    if (vectors == 1) ForRows(begin, end, FloatTile<1>{x, panel, k, count, w.K, w.N, n, out});
  }
}

// Threads share panels, and the rows of each if there are few panels. Then each packs its own.
template <typename Values>
void PanelFloat(ThreadPool& pool, const float* x, int64_t M, const Weights& w,
                const Values& values, float* out) {
  if (w.N == 0) return;
  const int64_t panels = (w.N + kPanel - 1) / kPanel;
  const int64_t wanted = (kPieces * Threads(pool) + panels - 1) / panels;
  const int64_t most = std::max<int64_t>(1, std::min(wanted, M / kRowsOfPiece));
  const int64_t rows = (M + most * kTileRows - 1) / (most * kTileRows) * kTileRows;
  const int64_t parts = (M + rows - 1) / rows;
  Parallel(pool, panels * parts, 1, 1, [&](int64_t begin, int64_t end) {
    float* panel = Scratch<float>(0, kPanel * kFloatDepth);
    for (int64_t at = begin, count; at < end; at += count) {
      const int64_t part = at % parts;
      count = std::min(parts - part, end - at);
      OnePanel(x, part * rows, std::min((part + count) * rows, M), w, values,
               at / parts * kPanel, panel, out);
    }
  });
}
