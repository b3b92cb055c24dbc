// Products of many rows of activations, with AVX512. Included by avx512.cc within its namespace.
//
// The weights of 64 columns are rearranged in the cache, once for all rows, into a panel: four vectors
// of 16 columns, one column per lane, for each step along K.

constexpr int kVectors = 4;
constexpr int64_t kPanel = kVectors * kLanes;
// Rows of a tile: with 4 vectors of columns, 24 accumulators.
constexpr int64_t kTileRows = 6;
// Elements along K for which a panel of bytes stays in the L2 cache, and how many beyond it are read where
// a part of a group does not fill the last tile.
constexpr int64_t kDepth = 4096, kBeyond = 60;

// Codes in the order in which tiles read them: for each block of rows, 4 codes of every row, then the
// next 4, with zeros beyond K.
std::vector<int8_t> ToTiles(ThreadPool& pool, const int8_t* x, int64_t M, int64_t K) {
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
  const int64_t pairs = std::min<int64_t>(32, (w.K - k) / 2);
  const auto within = static_cast<__mmask32>((uint64_t{1} << pairs) - 1);
  Bytes wide = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(within, from));
  return Low(Xor(_mm512_or_si512(wide, _mm512_slli_epi16(wide, 4)), 8));
}

// Transposes 16 rows of 16 quads of bytes.
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

// 16 quads of elements, starting at k, of 16 columns, starting at n: one vector per quad.
inline void Quads(const Weights& w, int64_t n, int64_t k, Ints (&quads)[16]) {
  for (int i = 0; i < 16; ++i) {
    quads[i] = Unsigned(w, n + i, k);
    Prefetch(w.at(std::min(n + i, w.N - 1), k) + 4 * kBytes);
  }
  Transpose(quads);
}

// Fills a panel with the unsigned codes k to end: four vectors for each quad of elements.
inline void PackCodes(const Weights& w, int64_t n, int64_t k, int64_t end, uint8_t* panel) {
  UNROLLED(v, kVectors)
    for (int64_t at = k; at < end; at += kBytes) {
      Ints quads[16];
      Quads(w, n + v * kLanes, at, quads);
      for (int i = 0; i < 16; ++i)
        _mm512_store_si512(panel + ((at - k) / 4 + i) * kPanel * 4 + v * kBytes, quads[i]);
    }
}

// Selects those of 16 columns, starting at n, that are below N.
inline __mmask16 ColumnMask(int64_t N, int64_t n) {
  return N - n >= kLanes ? 0xffff : N <= n ? 0 : (1u << (N - n)) - 1;
}

// Adds the products of R rows by a panel.
template <int R>
NOINLINE void AddCodes(Ints (&sums)[R][kVectors], const int8_t* x, const uint8_t* panel,
                     int64_t quads) {
  Ints acc[R][kVectors];
  UNROLLED(r, R)
    UNROLLED(v, kVectors) acc[r][v] = sums[r][v];
  for (int64_t q = 0; q < quads; ++q, x += 4 * R, panel += 4 * kPanel) {
    Bytes w[kVectors];
    UNROLLED(v, kVectors) w[v] = _mm512_load_si512(panel + v * kBytes);
    UNROLLED(r, R) {
      int32_t quad;
      std::memcpy(&quad, x + 4 * r, 4);
      Bytes in = _mm512_set1_epi32(quad);
      UNROLLED(v, kVectors) acc[r][v] = Dot(acc[r][v], w[v], in);
    }
  }
  UNROLLED(r, R)
    UNROLLED(v, kVectors) sums[r][v] = acc[r][v];
}

// Runs tile.Run<rows>(m) over blocks of the rows m to M.
template <typename Tile>
inline void ForRows(int64_t m, int64_t M, const Tile& tile) {
  for (; m + kTileRows <= M; m += kTileRows) tile.template Run<kTileRows>(m);
  if (M - m == 5) tile.template Run<5>(m);
  if (M - m == 4) tile.template Run<4>(m);
  if (M - m == 3) tile.template Run<3>(m);
  if (M - m == 2) tile.template Run<2>(m);
  if (M - m == 1) tile.template Run<1>(m);
}

// Bits of bfloat16: rounded to nearest, ties to even; NaN stays NaN.
inline Ints Rounded(Floats x) {
  __m512i bits = _mm512_castps_si512(x), high = _mm512_srli_epi32(bits, 16);
  __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, is_nan, high, _mm512_set1_epi32(0x40));
}

// Stores the results of 16 columns.
inline void Put(const Result& to, int64_t m, int64_t n, Floats sum) {
  const __mmask16 within = ColumnMask(to.N, n);
  const int64_t at = m * to.N + n;
  if (to.row) sum = Mul(sum, Broadcast(to.row[m]));
  if (to.column) sum = Mul(sum, _mm512_maskz_loadu_ps(within, to.column + n));
  if (to.type == Result::kFloat32)
    return _mm512_mask_storeu_ps(static_cast<float*>(to.out) + at, within, sum);
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(to.out) + at, within,
                           _mm512_cvtepi32_epi16(Rounded(sum)));
}
inline void Put(const Result& to, int64_t m, int64_t n, Ints sum) {
  if (to.type != Result::kInt32) return Put(to, m, n, ToFloats(sum));
  _mm512_mask_storeu_epi32(static_cast<int32_t*>(to.out) + m * to.N + n, ColumnMask(to.N, n), sum);
}

// A panel of 8-bit codes over a part of K, by rows whose sums are added to those of earlier parts.
struct Int8Panel {
  const int32_t* sums;  // (M,): of the activations
  const uint8_t* codes;
  int64_t quads, first, count, n;  // the panel holds `count` quads, starting at `first`
  int32_t* part;  // (M, kPanel): the sums of earlier parts, unless this is the first
  const Result& out;

  int32_t* Earlier(int64_t m, int v) const { return part + m * kPanel + v * kLanes; }
  // What the products of row m by vector v are added to.
  Ints Start(int64_t m, int v) const {
    return first ? LoadBytes(Earlier(m, v)) : _mm512_set1_epi32(-128 * sums[m]);
  }
  void Finish(int64_t m, int v, Ints sum) const {
    if (first + count == quads) Put(out, m, n + v * kLanes, sum);
    else _mm512_storeu_si512(Earlier(m, v), sum);
  }
};

// The scale and the zero point of 16 columns.
struct Affine {
  Floats scale, zero;

  // Adds products with codes, of which the sum is given, and the sum of the activations.
  Floats Add(Floats total, Ints sum, float activations) const {
    return MulAdd(NegMulAdd(zero, Broadcast(activations), ToFloats(sum)), scale, total);
  }
};

// A panel of codes in groups over a part of K, by rows whose sums are added to those of earlier parts. A
// sum within a part of a group is exact.
struct GroupsPanel {
  const float* sums;  // (M, parts): of the activations of each part of a group
  const uint8_t* codes;
  const float *scale, *zero;  // (parts, kPanel); zero points of unsigned codes
  const std::vector<int64_t>& parts;  // where they start, in quads, and the end
  int64_t first, last, n;
  float* part;  // (M, kPanel): the sums of earlier parts, unless this is the first
  const Result& out;

  int64_t count() const { return parts.size() - 1; }
  // The first code of part p.
  const uint8_t* At(int64_t p) const { return codes + (parts[p] - parts[first]) * 4 * kPanel; }
  Affine Columns(int64_t p, int v) const {
    return {Load(scale + p * kPanel + v * kLanes), Load(zero + p * kPanel + v * kLanes)};
  }
  float Activations(int64_t m, int64_t p) const { return sums[m * count() + p]; }
  void Finish(int64_t m, int v, Floats sum) const {
    float* earlier = part + m * kPanel + v * kLanes;
    if (first) sum = Add(sum, Load(earlier));
    if (last == count()) Put(out, m, n + v * kLanes, sum);
    else _mm512_storeu_ps(earlier, sum);
  }
};

// Rows of codes that registers multiply.
struct RegisterRows {
  int64_t M, quads;
  std::vector<int8_t> tiles;

  RegisterRows(ThreadPool& pool, const int8_t* x, int64_t M, const std::vector<int64_t>& parts)
      : M(M), quads((parts.back() + 3) / 4), tiles(ToTiles(pool, x, M, parts.back())) {}

  template <int R>
  const int8_t* At(int64_t m, int64_t quad) const {
    return tiles.data() + m * quads * 4 + quad * 4 * R;
  }
  void Multiply(const Int8Panel& by) const;
  void Multiply(const GroupsPanel& by) const;
};

struct Int8Tile {
  const RegisterRows& x;
  const Int8Panel& by;

  template <int R>
  void Run(int64_t m) const {
    Ints acc[R][kVectors];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kVectors; ++v) acc[r][v] = by.Start(m + r, v);
    AddCodes<R>(acc, x.At<R>(m, by.first), by.codes, by.count);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kVectors; ++v) by.Finish(m + r, v, acc[r][v]);
  }
};

struct GroupsTile {
  const RegisterRows& x;
  const GroupsPanel& by;

  template <int R>
  void Run(int64_t m) const {
    alignas(64) float total[R][kPanel] = {};
    for (int64_t p = by.first; p < by.last; ++p) {
      Ints acc[R][kVectors];
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < kVectors; ++v) acc[r][v] = ZeroInts();
      AddCodes<R>(acc, x.At<R>(m, by.parts[p]), by.At(p), by.parts[p + 1] - by.parts[p]);
      for (int v = 0; v < kVectors; ++v) {
        const Affine columns = by.Columns(p, v);
        for (int r = 0; r < R; ++r) {
          float* sum = total[r] + v * kLanes;
          _mm512_store_ps(sum, columns.Add(Load(sum), acc[r][v], by.Activations(m + r, p)));
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kVectors; ++v) by.Finish(m + r, v, Load(total[r] + v * kLanes));
  }
};

inline void RegisterRows::Multiply(const Int8Panel& by) const {
  ForRows(0, M, Int8Tile{*this, by});
}
inline void RegisterRows::Multiply(const GroupsPanel& by) const {
  ForRows(0, M, GroupsTile{*this, by});
}

void PanelInt8(ThreadPool& pool, const int8_t* x, int64_t M, const Weights& w,
               const Result& out) {
  std::vector<int32_t> sums = SumsOf<int32_t>(x, M, w.K);
  const RegisterRows rows(pool, x, M, {0, w.K});
  int64_t quads = (w.K + 3) / 4;
  Parallel(pool, w.N, kPanel, kPanel, [&](int64_t begin, int64_t last) {
    uint8_t* panel = Scratch<uint8_t>(0, kPanel * kDepth);
    int32_t* part = Scratch<int32_t>(2, w.K > kDepth ? M * kPanel : 0);
    for (int64_t n = begin; n < last; n += kPanel)
      for (int64_t k = 0; k < w.K; k += kDepth) {
        int64_t end = std::min(k + kDepth, w.K);
        PackCodes(w, n, k, end, panel);
        int64_t first = k / 4, count = (end - k + 3) / 4;
        rows.Multiply(Int8Panel{sums.data(), panel, quads, first, count, n, part, out});
      }
  });
}

// Where the parts of groups that lie within one panel start, in elements, and the end. Sums of 8-bit
// products are shorter, to be exact as floats.
inline std::vector<int64_t> Parts(const Weights& w) {
  const int64_t K = w.K, group = w.group(), most = w.bits == 4 ? kDepth : 512;
  std::vector<int64_t> parts;
  for (int64_t k = 0; k < K; k = std::min((k / group + 1) * group, (k / most + 1) * most))
    parts.push_back(k);
  parts.push_back(K);
  return parts;
}

void PanelGroups(ThreadPool& pool, const int8_t* x, int64_t M, const Weights& w,
                 const Result& out) {
  std::vector<int64_t> parts = Parts(w);
  const int64_t count = parts.size() - 1;
  std::vector<float> sums(M * count);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t p = 0; p < count; ++p)
      sums[m * count + p] = SumOf(x + m * w.K + parts[p], parts[p + 1] - parts[p]);
  const RegisterRows rows(pool, x, M, parts);
  std::vector<int64_t> quads = parts;
  for (int64_t& part : quads) part = (part + 3) / 4;
  Parallel(pool, w.N, kPanel, kPanel, [&](int64_t begin, int64_t end) {
    uint8_t* panel = Scratch<uint8_t>(0, kPanel * (kDepth + kBeyond));
    float *scale = Scratch<float>(1, 2 * count * kPanel), *zero = scale + count * kPanel;
    float* part = Scratch<float>(2, w.K > kDepth ? M * kPanel : 0);
    for (int64_t n = begin; n < end; n += kPanel) {
      for (int64_t p = 0; p < count; ++p)
        for (int64_t i = 0; i < kPanel; ++i) {
          int64_t at = std::min(n + i, w.N - 1) * w.G + parts[p] / w.group();
          scale[p * kPanel + i] = w.scales()[at];
          zero[p * kPanel + i] = (w.bits == 4 ? 8 : 128) + (w.zero ? w.zero[at] : 0);
        }
      for (int64_t first = 0, last; first < count; first = last) {
        int64_t k1 = std::min(parts[first] + kDepth, w.K);
        last = std::lower_bound(parts.begin(), parts.end(), k1) - parts.begin();
        PackCodes(w, n, parts[first], k1, panel);
        rows.Multiply(GroupsPanel{sums.data(), panel, scale, zero, quads, first, last, n, part, out});
      }
    }
  });
}
