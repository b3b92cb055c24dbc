// Causal attention over a cache of keys and values. Included by avx512.cc, avx2.cc and neon.cc within
// their namespaces.
//
// The queries that share a key head are rows: those of all tokens and of the heads of a group. A block
// of positions is widened to floats once for a chunk of rows, each of which keeps the largest score so
// far, the sum of its weights, and its weighted values: scores never leave the cache.

// Rows of a chunk, and positions of a block: their floats stay in the L1 and L2 caches.
constexpr int64_t kChunk = 64, kPositions = 64;
// Rows of a tile, and its keys or vectors of values: as many accumulators as registers hold.
constexpr int kQueries = 4, kAcross = kLanes == 16 ? 4 : 2;
// Multiplications that a thread does at least.
constexpr int64_t kMultiplied = 1 << 18;
// Where few heads would leave threads without work, positions are split, into parts of at least so many.
constexpr int64_t kLeastPositions = 256;

// Positions [first, first + count) of one head as rows of `stride` floats, with zeros at their ends.
template <typename Row>
NOINLINE void WidenRows(int64_t count, int64_t D, int64_t stride, float* to, const Row& widen) {
  for (int64_t s = 0; s < count; ++s, to += stride) {
    widen(s, to);
    std::fill(to + D, to + stride, 0.0f);
  }
}

inline void WidenPositions(const Attention& a, const void* stored, int64_t head, int64_t first,
                           int64_t count, int64_t stride, float* to) {
  const int64_t D = a.D, bytes = a.bytes();
  const uint8_t* from = static_cast<const uint8_t*>(stored) + (head * a.S + first) * bytes;
  const float* table = a.table;
  const auto widen = [=](const auto& row) { WidenRows(count, D, stride, to, row); };
  if (a.type == Attention::kFloat32)
    widen([=](int64_t s, float* out) { std::memcpy(out, from + s * bytes, bytes); });
  else if (a.type == Attention::kBFloat16)
    widen([=](int64_t s, float* out) {
      const auto* row = reinterpret_cast<const uint16_t*>(from + s * bytes);
      for (int64_t d = 0; d < D; ++d) out[d] = FloatOf(BitsOf(row[d]));
    });
  else if (a.type == Attention::kInt8)
    widen([=](int64_t s, float* out) {
      const auto* row = reinterpret_cast<const int8_t*>(from + s * bytes);
      for (int64_t d = 0; d < D; ++d) out[d] = row[d];
    });
  else if (a.type == Attention::kInt4)
    widen([=](int64_t s, float* out) {
      const uint8_t* row = from + s * bytes;
      const auto number = [](int nibble) { return static_cast<float>((nibble ^ 8) - 8); };
      for (int64_t i = 0; i < D / 2; ++i) {
        out[2 * i] = number(row[i] & 15);
        out[2 * i + 1] = number(row[i] >> 4);
      }
      if (D % 2) out[D - 1] = number(row[D / 2] & 15);
    });
  else
    widen([=](int64_t s, float* out) {
      for (int64_t d = 0; d < D; ++d) out[d] = table[from[s * bytes + d]];
    });
}

// scores[r][c] = the product of row r of `query` and row c of `keys`.
template <int R>
NOINLINE void Scores(const float* query, const float* keys, int64_t stride, int64_t count,
                     float* scores) {
  for (int64_t s = 0; s < count; s += kAcross) {
    Floats sum[kAcross][R];
    UNROLLED(c, kAcross)
      UNROLLED(r, R) sum[c][r] = Broadcast(0);
    for (int64_t d = 0; d < stride; d += kLanes)
      UNROLLED(c, kAcross) {
        const Floats key = Load(keys + (s + c) * stride + d);
        UNROLLED(r, R) sum[c][r] = MulAdd(key, Load(query + r * stride + d), sum[c][r]);
      }
    UNROLLED(c, kAcross)
      UNROLLED(r, R) scores[r * kPositions + s + c] = Sum(sum[c][r]);
  }
}

// out[r] = factor[r] * out[r] + the sum over positions s of weights[r][s] * values[s].
template <int R, int V>
NOINLINE void AddValues(const float* weights, const float* values, const float* factor,
                        int64_t stride, int64_t count, float* out) {
  Floats sum[R][V];
  UNROLLED(r, R)
    UNROLLED(v, V)
      sum[r][v] = Mul(Broadcast(factor[r]), Load(out + r * stride + v * kLanes));
  for (int64_t s = 0; s < count; ++s)
    UNROLLED(v, V) {
      const Floats value = Load(values + s * stride + v * kLanes);
      UNROLLED(r, R)
        sum[r][v] = MulAdd(value, Broadcast(weights[r * kPositions + s]), sum[r][v]);
    }
  UNROLLED(r, R)
    UNROLLED(v, V) Store(out + r * stride + v * kLanes, sum[r][v]);
}

// exp(x) for x <= 0, to 2 ulp; 0 below -87, NaN for NaN.
inline float ExpOf(float x) {
  // Adding 1.5 * 2^23 rounds to an integer, and leaves it in the low bits.
  const float shift = 12582912.0f, shifted = x * 1.44269504f + shift, n = shifted - shift;
  // x - n ln 2, with ln 2 in two parts.
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  for (float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = p * r + factor;
  const float power = FloatOf(BitsOf(p) + (BitsOf(shifted) << 23));
  return x != x ? x : x < -87.0f ? 0.0f : power;
}

// Turns scores into weights relative to the largest score so far; returns by what those before
// shrink. Adds the weights to `sum`.
NOINLINE float Weigh(float* scores, float& most, float& sum) {
  Floats largest = Broadcast(most);
  for (int64_t s = 0; s < kPositions; s += kLanes) largest = Max(largest, Load(scores + s));
  alignas(64) float lanes[kLanes];
  Store(lanes, largest);
  const float before = most;
  for (int64_t i = 0; i < kLanes; ++i) most = lanes[i] > most ? lanes[i] : most;
  const float now = most;
  for (int64_t s = 0; s < kPositions; ++s) scores[s] = ExpOf(scores[s] - now);
  Floats added = Broadcast(0);
  for (int64_t s = 0; s < kPositions; s += kLanes) added = Add(added, Load(scores + s));
  const float factor = ExpOf(before - now);
  sum = sum * factor + Sum(added);
  return factor;
}

// A chunk of rows of one head.
struct Rows {
  const Attention& a;
  int64_t head, first, count;  // of B * H heads, and of T * G rows
  int64_t stride;
  float *query, *out, *scores;  // (kChunk, stride) twice, and (kQueries, kPositions)
  float most[kChunk], sum[kChunk];

  // Positions that a row sees.
  int64_t Seen(int64_t row) const {
    const int64_t seen = a.starts[head / a.H] + int64_t{1} + (first + row) / a.G;
    return std::clamp<int64_t>(seen, 1, a.S);
  }
  // Where the queries of a row are in (B, T, H, G, D), and where its result goes.
  int64_t At(int64_t row) const {
    const int64_t b = head / a.H, h = head % a.H, t = (first + row) / a.G, g = (first + row) % a.G;
    return (((b * a.T + t) * a.H + h) * a.G + g) * a.D;
  }

  void Begin() {
    for (int64_t r = 0; r < count; ++r) {
      std::copy_n(a.query + At(r), a.D, query + r * stride);
      std::fill(query + r * stride + a.D, query + (r + 1) * stride, 0.0f);
      // Not -Inf, which scores of -Inf could not be compared with.
      most[r] = -std::numeric_limits<float>::max(), sum[r] = 0;
    }
    std::fill_n(out, count * stride, 0.0f);
  }

  // Adds the block of `size` positions from `start` to R rows.
  template <int R>
  void Add(int64_t row, int64_t start, int64_t size, const float* keys, const float* values) {
    const int64_t within = std::min(size, Seen(row + R - 1) - start);
    if (within <= 0) return;
    Scores<R>(query + row * stride, keys, stride, within, scores);
    float factor[R];
    for (int r = 0; r < R; ++r) {
      float* own = scores + r * kPositions;
      const int64_t seen = std::clamp<int64_t>(Seen(row + r) - start, 0, within);
      const int64_t at = head * a.S + start;
      if (a.key_scale)
        for (int64_t s = 0; s < seen; ++s) own[s] *= a.key_scale[at + s];
      std::fill(own + seen, own + kPositions, -std::numeric_limits<float>::infinity());
      factor[r] = Weigh(own, most[row + r], sum[row + r]);
      if (a.value_scale)
        for (int64_t s = 0; s < seen; ++s) own[s] *= a.value_scale[at + s];
    }
    int64_t d = 0;
    for (; d + kAcross * kLanes <= stride; d += kAcross * kLanes)
      AddValues<R, kAcross>(scores, values + d, factor, stride, within, out + row * stride + d);
    for (; d < stride; d += kLanes)
      AddValues<R, 1>(scores, values + d, factor, stride, within, out + row * stride + d);
  }

  void AddBlock(int64_t start, int64_t size, const float* keys, const float* values) {
    int64_t row = 0;
    for (; row + kQueries <= count; row += kQueries) Add<kQueries>(row, start, size, keys, values);
    if (count - row == 3) Add<3>(row, start, size, keys, values);
    if (count - row == 2) Add<2>(row, start, size, keys, values);
    if (count - row == 1) Add<1>(row, start, size, keys, values);
  }

  // Adds positions [begin, end), as many of them as the last row sees.
  void AddPositions(int64_t begin, int64_t end, float* keys, float* values) {
    end = std::min(end, Seen(count - 1));
    for (int64_t start = begin; start < end; start += kPositions) {
      const int64_t size = std::min(kPositions, end - start);
      WidenPositions(a, a.keys, head, start, size, stride, keys);
      WidenPositions(a, a.values, head, start, size, stride, values);
      // Tiles read a few keys more.
      std::fill(keys + size * stride, keys + std::min(kPositions, size + kAcross) * stride, 0.0f);
      AddBlock(start, size, keys, values);
    }
  }

  // Adds what another thread found in other positions: by row the values, the largest score, the sum.
  void AddPart(const float* part) {
    for (int64_t r = 0; r < count; ++r, part += stride + 2) {
      const float now = std::max(most[r], part[stride]);
      const float own = ExpOf(most[r] - now), other = ExpOf(part[stride] - now);
      for (int64_t d = 0; d < a.D; ++d)
        out[r * stride + d] = own * out[r * stride + d] + other * part[d];
      most[r] = now, sum[r] = own * sum[r] + other * part[stride + 1];
    }
  }
  void PutPart(float* part) const {
    for (int64_t r = 0; r < count; ++r, part += stride + 2) {
      std::copy_n(out + r * stride, stride, part);
      part[stride] = most[r], part[stride + 1] = sum[r];
    }
  }

  void End() {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t d = 0; d < a.D; ++d) a.out[At(r) + d] = out[r * stride + d] / sum[r];
  }
};

void Attend(ThreadPool& pool, const Attention& a) {
  const int64_t all = a.T * a.G, heads = a.B * a.H, chunks = (all + kChunk - 1) / kChunk;
  const int64_t stride = (a.D + kLanes - 1) / kLanes * kLanes;
  int64_t seen = 1;
  for (int64_t b = 0; b < a.B; ++b) seen = std::max(seen, std::min(a.starts[b] + a.T, a.S));
  // More parts than threads, so that all of these finish at the same time.
  const int64_t wanted = std::min(4 * Threads(pool) / (heads * chunks), seen / kLeastPositions);
  const int64_t splits = std::max<int64_t>(1, wanted), size = std::min(all, kChunk) * (stride + 2);
  const int64_t blocks = (seen + kPositions - 1) / kPositions;
  std::vector<float> parts(splits > 1 ? heads * chunks * splits * size : 0);

  // The rows of a chunk of a head. The last chunks, which see the most positions, come first.
  const auto chunk_of = [&, all, heads, chunks, stride](int64_t i) {
    float* rows = Scratch<float>(0, 2 * kChunk * stride + kQueries * kPositions);
    const int64_t first = (chunks - 1 - i / heads) * kChunk;
    Rows chunk{a, i % heads, first, std::min(kChunk, all - first), stride, rows,
               rows + kChunk * stride, rows + 2 * kChunk * stride, {}, {}};
    chunk.Begin();
    return chunk;
  };
  const int64_t work = 2 * std::min(all, kChunk) * seen * a.D / splits;
  const int64_t least = std::max<int64_t>(1, kMultiplied / std::max<int64_t>(1, work));
  Parallel(pool, heads * chunks * splits, least, 1, [&](int64_t begin, int64_t end) {
    float* block = Scratch<float>(1, 2 * kPositions * stride);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % splits;
      Rows chunk = chunk_of(i / splits);
      chunk.AddPositions(blocks * part / splits * kPositions,
                         blocks * (part + 1) / splits * kPositions, block,
                         block + kPositions * stride);
      if (splits == 1) chunk.End();
      else chunk.PutPart(parts.data() + i * size);
    }
  });
  for (int64_t i = 0; splits > 1 && i < heads * chunks; ++i) {
    Rows chunk = chunk_of(i);
    for (int64_t part = 0; part < splits; ++part)
      chunk.AddPart(parts.data() + (i * splits + part) * size);
    chunk.End();
  }
}
