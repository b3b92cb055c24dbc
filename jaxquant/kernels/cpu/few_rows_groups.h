// Products of few rows of 8-bit activations by weights in groups. Included by few_rows.h.

// The groups of a row of weights, by block: lane l holds `elements` elements of each block, from
// first + l * elements on.
class LaneGroups {
 public:
  LaneGroups(const Weights& w, int64_t block, int64_t first, int64_t elements) : block_(block) {
    for (int64_t k = first; k - first < w.K; k += block) {
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
    const Block& block = blocks_[k / block_];
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
  int64_t block_;
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

// 8-bit activations by weights of `bits` bits in groups: sums over groups of scale * sum(x * (code -
// zero)). A lane sums its elements of a block exactly and multiplies by their scale; the rest are
// float32 additions.
template <int bits>
struct Int8ByGroups {
  // Elements that one vector holds, and each lane of it.
  static constexpr int64_t kBlock = kBytes * 8 / bits, kElements = kBlock / kLanes;
  // What is added to codes, so that they suit the instructions.
  static constexpr int kAdded = bits == 4 ? 8 : kOffset;

  const int8_t* x;    // (M, stride), of 4 bits evens then odds in each block
  const float* sums;  // (M, stride / kElements): of the activations of each lane
  int64_t stride;
  Weights w;
  Result out;
  LaneGroups lane_groups;

  // A block of weights, with the scale and the zero point of each lane.
  struct Block {
    Bytes codes;
    Floats step, zero;
  };
  Block Read(const uint8_t* from, int64_t n, int64_t k) const {
    Floats zero = Broadcast(kAdded);
    if (w.zero) zero = Add(zero, lane_groups.Pick(w.zero + n * w.G, k));
    return {Xor(LoadBytes(from), bits == 4 ? 0x88 : kOffset),
            lane_groups.Pick(w.scale + n * w.G, k), zero};
  }
  static Ints Products(Bytes codes, const int8_t* in) {
    if constexpr (bits == 8) return DotQuads(codes, LoadBytes(in));
    else return DotNibbles(Low(codes), High(codes), LoadBytes(in), LoadBytes(in + kBytes));
  }

  // Adds the products of a block.
  Floats AddTo(Floats sum, const Block& block, int64_t m, int64_t k) const {
    const int64_t at = m * stride + k;
    Floats products = ToFloats(Products(block.codes, x + at));
    // Exact: integers below 2^24.
    Floats total = NegMulAdd(block.zero, Load(sums + at / kElements), products);
    return MulAdd(total, block.step, sum);
  }

  NOINLINE void One(int64_t m, int64_t n) const {
    const uint8_t* row = w.at(n, 0);
    const int64_t whole = w.K / kBlock * kBlock;
    Floats sum = SumBlocks(whole, kBlock, Broadcast(0), [=](Floats sum, int64_t k) {
      Prefetch(row + k * bits / 8 + kAheadInRow);
      return AddTo(sum, Read(row + k * bits / 8, n, k), m, k);
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
        const uint8_t* from = rows + (c * K + k) * bits / 8;
        Prefetch(from + kAhead * C * K * bits / 8);
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

// Sums of the activations of each lane, which holds `elements` of them.
inline std::vector<float> SumsOfLanes(const int8_t* x, int64_t M, int64_t K, int64_t stride,
                                      int64_t elements) {
  std::vector<float> sums(M * stride / elements);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t k = 0; k < K; k += elements)
      sums[(m * stride + k) / elements] = SumOf(x + m * K + k, std::min(elements, K - k));
  return sums;
}

template <int bits>
void FewRowsGroups(ThreadPool& pool, const int8_t* x, int64_t M, const Weights& w,
                   const Result& out) {
  using Kernel = Int8ByGroups<bits>;
  const int64_t block = Kernel::kBlock, stride = (w.K + block - 1) / block * block;
  std::vector<int8_t> arranged =
      bits == 4 ? EvensThenOdds(x, M, w.K, block, stride) : WithStride(x, M, w.K, stride);
  std::vector<float> sums = SumsOfLanes(x, M, w.K, stride, Kernel::kElements);
  LaneGroups groups(w, block, 0, Kernel::kElements);
  ForTiles(pool, M, w, w.K, Kernel{arranged.data(), sums.data(), stride, w, out, groups});
}
