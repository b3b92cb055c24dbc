// Products of few rows of activations by 4-bit weights. Included by few_rows.h.

// Elements of a 4-bit weight that one vector holds.
constexpr int64_t kBlock = 2 * kBytes;

// The groups of a row of 4-bit weights, by block: lane l holds `elements` elements of each block, from
// first + l * elements on.
class LaneGroups {
 public:
  LaneGroups(const Weights& w, int64_t first, int64_t elements) {
    for (int64_t k = first; k - first < w.K; k += kBlock) {
      auto group = [&](int64_t l) { return std::min((k + l * elements) / w.group(), w.G - 1); };
      const int64_t start = group(0), count = group(kLanes - 1) - start + 1;
      Lanes lanes{};
      for (int64_t l = 0; l < kLanes && count > 1; ++l) lanes.index[l] = group(l) - start;
      // Most blocks are like the one before.
      if (lanes_.empty() || std::memcmp(&lanes, &lanes_.back(), sizeof(Lanes)))
        lanes_.push_back(lanes);
      blocks_.push_back({static_cast<int32_t>(start), static_cast<int32_t>(count),
                         static_cast<int64_t>(lanes_.size() - 1)});
    }
  }

  // Of the values of a row's groups, that of each lane's group in the block at k.
  Floats Pick(const float* row, int64_t k) const {
    const Block& block = blocks_[k / kBlock];
    return Gather(row + block.start, lanes_[block.lanes].index, block.count);
  }

 private:
  struct Lanes {
    alignas(64) int32_t index[kLanes];
  };
  // Its lanes belong to `count` groups from `start` on.
  struct Block {
    int32_t start, count;
    int64_t lanes;
  };
  std::vector<Lanes> lanes_;
  std::vector<Block> blocks_;
};

// The codes of the last block of a row, which the row does not fill. What follows the row is multiplied
// by zero, unless the array ends there: then it is copied, with zeros.
inline const uint8_t* LastBlock(const Weights& w, int64_t n, int64_t k, Padded<kBytes>& copy) {
  const uint8_t* from = w.at(n, k);
  const int64_t left = w.at(w.N, 0) - from;
  if (left >= kBytes) return from;
  copy = Padded<kBytes>(from, left);
  return copy.bytes;
}

// 8-bit activations, 4-bit weights in groups: sums over groups of scale * sum(x * (code - zero)).
// A lane sums 8 elements exactly and multiplies by their scale; the rest are float32 additions.
struct Int8ByInt4 {
  const int8_t* x;    // (M, stride), evens then odds in each block
  const float* sums;  // (M, stride / 8): of the 8 activations of each lane
  int64_t stride;
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
    Floats zero = Broadcast(8);
    if (w.zero) zero = Add(zero, lane_groups.Pick(w.zero + n * w.G, k));
    return {Low(both), High(both), lane_groups.Pick(w.scale + n * w.G, k), zero};
  }

  // Adds the products of a block.
  Floats AddTo(Floats sum, const Block& block, int64_t m, int64_t k) const {
    const int8_t* in = x + m * stride + k;
    Ints products = DotNibbles(block.even, block.odd, LoadBytes(in), LoadBytes(in + kBytes));
    // Exact: integers below 2^24.
    Floats total = NegMulAdd(block.zero, Load(sums + (m * stride + k) / 8), ToFloats(products));
    return MulAdd(total, block.step, sum);
  }

  NOINLINE void One(int64_t m, int64_t n) const {
    const uint8_t* row = w.at(n, 0);
    const int64_t whole = w.K / kBlock * kBlock;
    Floats sum = SumBlocks(whole, kBlock, Broadcast(0), [=](Floats sum, int64_t k) {
      Prefetch(row + k / 2 + kAheadInRow);
      return AddTo(sum, Read(row + k / 2, n, k), m, k);
    });
    Padded<kBytes> copy;
    if (whole < w.K) sum = AddTo(sum, Read(LastBlock(w, n, whole, copy), n, whole), m, whole);
    out.Put(m, n, Sum(sum));
  }

  template <int R, int C>
  void Tile(int64_t m, int64_t n) const {
    const int64_t K = w.K;
    const uint8_t* rows = w.at(n, 0);
    Floats acc[R][C];
    UNROLLED(r, R)
      UNROLLED(c, C) acc[r][c] = Broadcast(0);
    int64_t k = 0;
    for (; k + kBlock <= K; k += kBlock)
      UNROLLED(c, C) {
        const uint8_t* from = rows + (c * K + k) / 2;
        Prefetch(from + kAhead * C * K / 2);
        Block block = Read(from, n + c, k);
        UNROLLED(r, R) acc[r][c] = AddTo(acc[r][c], block, m + r, k);
      }
    Padded<kBytes> copy;
    if (k < K)
      UNROLLED(c, C) {
        Block block = Read(LastBlock(w, n + c, k, copy), n + c, k);
        UNROLLED(r, R) acc[r][c] = AddTo(acc[r][c], block, m + r, k);
      }
    UNROLLED(r, R)
      UNROLLED(c, C) out.Put(m + r, n + c, Sum(acc[r][c]));
  }
};

// Float activations, 4-bit weights in groups, each code looked up in a table of 16 floats.
struct FloatByTable {
  const float* x;  // (M, stride), evens then odds in each 2 * kLanes elements
  int64_t stride;
  Weights w;
  const float* table;
  float* out;
  LaneGroups lane_groups[4];  // for each quarter of a block

  // A quarter of a block of weights minus their zero points, with the scale of each lane.
  struct Quarter {
    Floats evens, odds, step;
  };
  Quarter Read(const Table& values, const uint8_t* from, int64_t n, int64_t k, int i) const {
    Ints pairs = NibblePairs(from + kLanes * i);
    Floats evens = values[LowNibbles(pairs)], odds = values[HighNibbles(pairs)];
    if (w.zero) {
      Floats zero = lane_groups[i].Pick(w.zero + n * w.G, k);
      evens = Sub(evens, zero), odds = Sub(odds, zero);
    }
    return {evens, odds, lane_groups[i].Pick(w.scale + n * w.G, k)};
  }

  // Adds the products of a quarter with the activations at `in`.
  static Floats AddTo(Floats sum, const Quarter& part, const float* in) {
    Floats products = MulAdd(part.odds, Load(in + kLanes), Mul(part.evens, Load(in)));
    return MulAdd(products, part.step, sum);
  }

  // Adds the products of the block at k, whose codes are at `from`, to the sums of R rows.
  template <int R>
  void AddBlock(Floats (&sums)[R], const Table& values, const uint8_t* from, int64_t m, int64_t n,
                int64_t k) const {
    for (int i = 0; i < 4; ++i) {
      Quarter part = Read(values, from, n, k, i);
      UNROLLED(r, R)
        sums[r] = AddTo(sums[r], part, x + (m + r) * stride + k + 2 * kLanes * i);
    }
  }

  NOINLINE void One(int64_t m, int64_t n) const {
    const uint8_t* row = w.at(n, 0);
    const float* in = x + m * stride;
    const Table values(table);
    Floats acc[4] = {Broadcast(0), Broadcast(0), Broadcast(0), Broadcast(0)};
    int64_t k = 0;
    for (; k + kBlock <= w.K; k += kBlock) {
      Prefetch(row + k / 2 + kAheadInRow);
      UNROLLED(i, 4)
        acc[i] = AddTo(acc[i], Read(values, row + k / 2, n, k, i), in + k + 2 * kLanes * i);
    }
    Floats sum[1] = {Add(Add(acc[0], acc[1]), Add(acc[2], acc[3]))};
    Padded<kBytes> copy;
    if (k < w.K) AddBlock<1>(sum, values, LastBlock(w, n, k, copy), m, n, k);
    out[m * w.N + n] = Sum(sum[0]);
  }

  template <int R, int C>
  void Tile(int64_t m, int64_t n) const {
    const int64_t K = w.K;
    const uint8_t* rows = w.at(n, 0);
    const Table values(table);
    Floats acc[C][R];
    UNROLLED(c, C)
      UNROLLED(r, R) acc[c][r] = Broadcast(0);
    int64_t k = 0;
    for (; k + kBlock <= K; k += kBlock)
      UNROLLED(c, C) {
        const uint8_t* from = rows + (c * K + k) / 2;
        Prefetch(from + kAhead * C * K / 2);
        AddBlock<R>(acc[c], values, from, m, n + c, k);
      }
    Padded<kBytes> copy;
    if (k < K)
      UNROLLED(c, C) AddBlock<R>(acc[c], values, LastBlock(w, n + c, k, copy), m, n + c, k);
    UNROLLED(r, R)
      UNROLLED(c, C) out[(m + r) * w.N + n + c] = Sum(acc[c][r]);
  }
};

// Sums of the 8 activations of each lane.
inline std::vector<float> SumsOfLanes(const int8_t* x, int64_t M, int64_t K, int64_t stride) {
  std::vector<float> sums(M * stride / 8);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t k = 0; k < K; k += 8)
      sums[(m * stride + k) / 8] = SumOf(x + m * K + k, std::min<int64_t>(8, K - k));
  return sums;
}

void FewRowsInt4(ThreadPool& pool, const int8_t* x, int64_t M, const Weights& w,
                 const Result& out) {
  const int64_t stride = (w.K + kBlock - 1) / kBlock * kBlock;
  std::vector<int8_t> arranged = EvensThenOdds(x, M, w.K, kBlock, stride);
  std::vector<float> sums = SumsOfLanes(x, M, w.K, stride);
  ForTiles(pool, M, w, w.K,
           Int8ByInt4{arranged.data(), sums.data(), stride, w, out, LaneGroups(w, 0, 8)});
}

void FewRowsLookup(ThreadPool& pool, const float* x, int64_t M, const Weights& w,
                   const float* table, float* out) {
  const int64_t stride = (w.K + kBlock - 1) / kBlock * kBlock;
  std::vector<float> arranged = EvensThenOdds(x, M, w.K, 2 * kLanes, stride);
  auto quarter = [&](int i) { return LaneGroups(w, 2 * kLanes * i, 2); };
  ForTiles(pool, M, w, 4 * w.K,
           FloatByTable{arranged.data(), stride, w, table, out,
                        {quarter(0), quarter(1), quarter(2), quarter(3)}});
}
