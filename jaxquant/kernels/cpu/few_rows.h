// Products of few rows of activations, in terms of the vectors of one instruction set. Included by
// avx512.cc, avx2.cc and neon.cc within their namespaces.
//
// A vector holds elements of one row of weights. Each lane sums some of them, and lanes are added at
// the very end. So weights are read once, as they are stored, 4-bit ones two to a byte.
//
// LoadBytes(p) and the like come from the including file; kOffset says how Dot expects weights.

// Activations that stay in the L2 cache while rows of weights pass by, in bytes.
constexpr int64_t kInputsInCache = 1 << 18;
// Rows of weights that stay in the L1 cache while blocks of activations pass by.
constexpr int64_t kColumns = 64;
// How many steps ahead the weights of the next columns are prefetched: the hardware alone has too few
// reads in flight to use the memory's bandwidth.
constexpr int64_t kAhead = 4;
// The same for one row after another, in bytes. Prefetched into L2, 8-bit codes of 4096 x 4096 arrive
// at 96 % of the bandwidth of a plain sum for one row; into L1 at 79 %, without prefetching at 80 %.
constexpr int64_t kAheadInRow = 4096;

constexpr int64_t kBytes = sizeof(Bytes);
// Accumulators for one row of weights.
constexpr int kSums = 4;
// Elements of a 4-bit weight that one vector holds.
constexpr int64_t kBlock = 2 * kBytes;

// Picks scales for lanes that hold `elements` elements of a block each: lane l belongs to group
// (first + l * elements) / group, counted from the group where the block begins.
struct LaneGroups {
  alignas(64) int32_t index[kLanes];
  int count;
  uint64_t inverse;  // 2^64 / group, rounded up

  LaneGroups(int64_t first, int64_t elements, int64_t group) {
    for (int64_t l = 0; l < kLanes; ++l) index[l] = (first + l * elements) / group;
    count = index[kLanes - 1] + 1;
    inverse = group == 1 ? 0 : ~uint64_t{0} / group + 1;
  }
  Floats operator()(const float* from) const { return Gather(from, index, count); }
  // k / group, without a division, which takes as long as a whole block. Groups of one element do
  // not occur.
  int64_t GroupOf(int64_t k) const {
    return static_cast<unsigned __int128>(k) * inverse >> 64;
  }
};

// Sums a row of K elements in blocks: add(sum, k) adds the block at k to sum. There are several
// sums, so that no addition waits for the one before.
template <typename Sum, typename AddBlock>
inline Sum SumBlocks(int64_t K, int64_t block, Sum none, const AddBlock& add) {
  Sum sum[kSums];
  UNROLLED(i, kSums) sum[i] = none;
  int64_t k = 0;
  for (; k + kSums * block <= K; k += kSums * block)
    UNROLLED(i, kSums) sum[i] = add(sum[i], k + i * block);
  for (; k + block <= K; k += block) sum[0] = add(sum[0], k);
  return Add(Add(sum[0], sum[1]), Add(sum[2], sum[3]));
}

// Calls kernel.Tile<rows, columns>(m, n), or kernel.One(m, n) for one row of activations: weights are
// then read in memory order, as fast as one core can.
template <int R, typename Kernel>
inline void Columns(const Kernel& kernel, int64_t m, int64_t n, int64_t end) {
  if constexpr (R == 1) {
    for (; n < end; ++n) kernel.One(m, n);
    return;
  }
  for (; n + kTileColumns <= end; n += kTileColumns) kernel.template Tile<R, kTileColumns>(m, n);
  for (; n < end; ++n) kernel.template Tile<R, 1>(m, n);
}

// Runs a kernel over all columns, in blocks of rows that stay in the cache.
template <typename Kernel>
void ForTiles(ThreadPool& pool, int64_t M, const Weights& w, int64_t input_bytes,
              const Kernel& kernel) {
  int64_t rows = kInputsInCache / std::max<int64_t>(1, input_bytes) / kRows * kRows;
  rows = std::max<int64_t>(kRows, rows);
  int64_t least = std::max<int64_t>(16, (1 << 16) / w.bytes());
  Parallel(pool, w.N, least, kTileColumns, [&](int64_t first, int64_t last) {
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

// 8-bit activations, 8-bit weights: exact sums of codes.
struct Int8ByInt8 {
  const int8_t* x;
  const int32_t* sums;  // (M,): of the activations of each row
  Weights w;
  Result out;

  // Adds the products of one vector of weights.
  static Ints AddTo(Ints sum, Bytes weights, Bytes inputs) {
    return Dot(sum, Xor(weights, kOffset), inputs);
  }

  // With its offset the sum may overflow 32 bits; subtracting the offset undoes that.
  void Put(int64_t m, int64_t n, Ints sum) const {
    const int64_t rest = w.K % kBytes, from = w.K - rest;
    if (rest)
      sum = AddTo(sum, LoadPart(w.at(n, from), rest), LoadPart(x + m * w.K + from, rest));
    uint32_t offset = static_cast<uint32_t>(kOffset) * static_cast<uint32_t>(sums[m]);
    out.Put(m, n, static_cast<int32_t>(static_cast<uint32_t>(Sum(sum)) - offset));
  }

  NOINLINE void One(int64_t m, int64_t n) const {
    const uint8_t* weights = w.at(n, 0);
    const int8_t* inputs = x + m * w.K;
    Put(m, n, SumBlocks(w.K, kBytes, ZeroInts(), [=](Ints sum, int64_t k) {
          PrefetchFar(weights + k + kAheadInRow);
          return AddTo(sum, LoadBytes(weights + k), LoadBytes(inputs + k));
        }));
  }

  // Sums over full vectors.
  template <int R, int C>
  NOINLINE void AddVectors(Ints (&sum)[R][C], int64_t m, int64_t n) const {
    const int64_t K = w.K;
    const uint8_t* rows = w.at(n, 0);
    Ints acc[R][C];
    UNROLLED(r, R)
      UNROLLED(c, C) acc[r][c] = ZeroInts();
    for (int64_t k = 0; k + kBytes <= K; k += kBytes)
      UNROLLED(c, C) {
        const uint8_t* from = rows + c * K + k;
        PrefetchFar(from + kAhead * C * K);
        Bytes weights = Xor(LoadBytes(from), kOffset);
        UNROLLED(r, R) acc[r][c] = Dot(acc[r][c], weights, LoadBytes(x + (m + r) * K + k));
      }
    UNROLLED(r, R)
      UNROLLED(c, C) sum[r][c] = acc[r][c];
  }

  template <int R, int C>
  void Tile(int64_t m, int64_t n) const {
    Ints acc[R][C];
    AddVectors<R, C>(acc, m, n);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) Put(m + r, n + c, acc[r][c]);
  }
};

// 8-bit activations, 4-bit weights in groups: sums over groups of scale * sum(x * (code - zero)).
// A lane sums 8 elements exactly and multiplies by their scale; the rest are float32 additions.
struct Int8ByInt4 {
  const int8_t* x;    // (M, K), evens then odds in each block
  const float* sums;  // (M, K / 8): of the 8 activations of each lane
  Weights w;
  Result out;
  LaneGroups lane_groups;

  // A block of weights as unsigned nibbles, with the scale and unsigned zero point of each lane.
  struct Block {
    Bytes even, odd;
    Floats step, zero;
  };
  Block Read(const uint8_t* from, int64_t n, int64_t k) const {
    Bytes both = Xor(LoadBytes(from), 0x88);
    const int64_t at = n * w.G + lane_groups.GroupOf(k);
    Floats zero = Broadcast(8);
    if (w.zero) zero = Add(zero, lane_groups(w.zero + at));
    return {Low(both), High(both), lane_groups(w.scale + at), zero};
  }

  // Adds the products of a block.
  Floats AddTo(Floats sum, const Block& block, int64_t m, int64_t k) const {
    const int8_t* in = x + m * w.K + k;
    Ints products = DotNibbles(block.even, block.odd, LoadBytes(in), LoadBytes(in + kBytes));
    // Exact: integers below 2^24.
    Floats total = NegMulAdd(block.zero, Load(sums + (m * w.K + k) / 8), ToFloats(products));
    return MulAdd(total, block.step, sum);
  }

  NOINLINE void One(int64_t m, int64_t n) const {
    const uint8_t* row = w.at(n, 0);
    out.Put(m, n, Sum(SumBlocks(w.K, kBlock, Broadcast(0), [=](Floats sum, int64_t k) {
              Prefetch(row + k / 2 + kAheadInRow);
              return AddTo(sum, Read(row + k / 2, n, k), m, k);
            })));
  }

  template <int R, int C>
  void Tile(int64_t m, int64_t n) const {
    const int64_t K = w.K;
    const uint8_t* rows = w.at(n, 0);
    Floats acc[R][C];
    UNROLLED(r, R)
      UNROLLED(c, C) acc[r][c] = Broadcast(0);
    for (int64_t k = 0; k < K; k += kBlock)
      UNROLLED(c, C) {
        const uint8_t* from = rows + (c * K + k) / 2;
        Prefetch(from + kAhead * C * K / 2);
        Block block = Read(from, n + c, k);
        UNROLLED(r, R) acc[r][c] = AddTo(acc[r][c], block, m + r, k);
      }
    UNROLLED(r, R)
      UNROLLED(c, C) out.Put(m + r, n + c, Sum(acc[r][c]));
  }
};

// Float activations, 4-bit weights in groups, each code looked up in a table of 16 floats.
struct FloatByTable {
  const float* x;  // (M, K), evens then odds in each 2 * kLanes elements
  Weights w;
  const float* table;
  float* out;
  LaneGroups lane_groups[4];  // for each quarter of a block

  // A quarter of a block of weights minus their zero points, with the scale of each lane.
  struct Quarter {
    Floats evens, odds, step;
  };
  Quarter Read(const Table& values, const uint8_t* from, int64_t at, int i) const {
    Ints pairs = NibblePairs(from + kLanes * i);
    Floats evens = values[LowNibbles(pairs)], odds = values[HighNibbles(pairs)];
    if (w.zero) {
      Floats zero = lane_groups[i](w.zero + at);
      evens = Sub(evens, zero), odds = Sub(odds, zero);
    }
    return {evens, odds, lane_groups[i](w.scale + at)};
  }

  // Adds the products of a quarter with the activations at `in`.
  static Floats AddTo(Floats sum, const Quarter& part, const float* in) {
    Floats products = MulAdd(part.odds, Load(in + kLanes), Mul(part.evens, Load(in)));
    return MulAdd(products, part.step, sum);
  }

  NOINLINE void One(int64_t m, int64_t n) const {
    const uint8_t* row = w.at(n, 0);
    const float* in = x + m * w.K;
    const Table values(table);
    Floats acc[4] = {Broadcast(0), Broadcast(0), Broadcast(0), Broadcast(0)};
    for (int64_t k = 0; k < w.K; k += kBlock) {
      const int64_t at = n * w.G + lane_groups[0].GroupOf(k);
      Prefetch(row + k / 2 + kAheadInRow);
      UNROLLED(i, 4)
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
    UNROLLED(r, R)
      UNROLLED(c, C) acc[r][c] = Broadcast(0);
    for (int64_t k = 0; k < K; k += kBlock)
      UNROLLED(c, C) {
        const uint8_t* from = rows + (c * K + k) / 2;
        const int64_t at = (n + c) * w.G + lane_groups[0].GroupOf(k);
        Prefetch(from + kAhead * C * K / 2);
        for (int i = 0; i < 4; ++i) {
          Quarter part = Read(values, from, at, i);
          UNROLLED(r, R)
            acc[r][c] = AddTo(acc[r][c], part, x + (m + r) * K + k + 2 * kLanes * i);
        }
      }
    UNROLLED(r, R)
      UNROLLED(c, C) out[(m + r) * w.N + n + c] = Sum(acc[r][c]);
  }
};

// Float activations, 8-bit weights: sums of activations * codes.
struct FloatByInt8 {
  const float* x;
  Weights w;
  float* out;

  // Stores a sum over full vectors plus the rest of the row.
  void Put(int64_t m, int64_t n, float sum) const {
    for (int64_t k = w.K / kLanes * kLanes; k < w.K; ++k)
      sum += x[m * w.K + k] * static_cast<int8_t>(*w.at(n, k));
    out[m * w.N + n] = sum;
  }

  NOINLINE void One(int64_t m, int64_t n) const {
    const int8_t* row = reinterpret_cast<const int8_t*>(w.at(n, 0));
    const float* in = x + m * w.K;
    Put(m, n, Sum(SumBlocks(w.K, kLanes, Broadcast(0), [=](Floats sum, int64_t k) {
          if (k % 64 == 0) PrefetchFar(row + k + kAheadInRow);
          return MulAdd(ToFloats(Widen(row + k)), Load(in + k), sum);
        })));
  }

  template <int R, int C>
  void Tile(int64_t m, int64_t n) const {
    const int64_t K = w.K;
    const int8_t* rows = reinterpret_cast<const int8_t*>(w.at(n, 0));
    Floats acc[R][C];
    UNROLLED(r, R)
      UNROLLED(c, C) acc[r][c] = Broadcast(0);
    for (int64_t k = 0; k + kLanes <= K; k += kLanes)
      UNROLLED(c, C) {
        const int8_t* from = rows + c * K + k;
        if (k % 64 == 0) PrefetchFar(from + kAhead * C * K);
        Floats weights = ToFloats(Widen(from));
        UNROLLED(r, R)
          acc[r][c] = MulAdd(weights, Load(x + (m + r) * K + k), acc[r][c]);
      }
    UNROLLED(r, R)
      UNROLLED(c, C) Put(m + r, n + c, Sum(acc[r][c]));
  }
};

void FewRowsInt8(ThreadPool& pool, const int8_t* x, int64_t M, const Weights& w,
                 const Result& out) {
  std::vector<int32_t> sums = SumsOf<int32_t>(x, M, w.K);
  ForTiles(pool, M, w, w.K, Int8ByInt8{x, sums.data(), w, out});
}

void FewRowsInt4(ThreadPool& pool, const int8_t* x, int64_t M, const Weights& w,
                 const Result& out) {
  std::vector<int8_t> arranged = EvensThenOdds(x, M * w.K, kBlock);
  std::vector<float> sums = SumsOf<float>(x, M * w.K / 8, 8);
  ForTiles(pool, M, w, w.K,
           Int8ByInt4{arranged.data(), sums.data(), w, out, LaneGroups(0, 8, w.group())});
}

void FewRowsLookup(ThreadPool& pool, const float* x, int64_t M, const Weights& w,
                   const float* table, float* out) {
  std::vector<float> arranged = EvensThenOdds(x, M * w.K, 2 * kLanes);
  auto quarter = [&](int i) { return LaneGroups(2 * kLanes * i, 2, w.group()); };
  ForTiles(pool, M, w, 4 * w.K,
           FloatByTable{arranged.data(), w, table, out,
                        {quarter(0), quarter(1), quarter(2), quarter(3)}});
}

void FewRowsWiden(ThreadPool& pool, const float* x, int64_t M, const Weights& w, float* out) {
  ForTiles(pool, M, w, 4 * w.K, FloatByInt8{x, w, out});
}
