// Products of few rows of 8-bit activations by weights in groups. Included by few_rows.h.

// The groups of a row of weights, by block of `block` elements: lane l holds `elements` of each, from
// first + l * elements on.
template <int64_t block>
class LaneGroups {
 public:
  LaneGroups(const Weights& w, int64_t first, int64_t elements) {
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

  // How many groups each block has that a row fills, if that is one, or if blocks share none; else 0.
  int PerBlock(int64_t K) const {
    const auto is_one = [](const Block& at) { return at.count == 1; };
    if (std::all_of(blocks_.begin(), blocks_.end(), is_one)) return 1;
    if (K < block) return 0;
    const int64_t count = blocks_[0].count;
    for (int64_t b = 0; b < K / block; ++b)
      if (blocks_[b].start != b * count || blocks_[b].count != count || blocks_[b].lanes) return 0;
    return count;
  }

  // Of the values of a row's groups, that of each lane's group in the block at k. If the row fills the
  // block, `per_block` may be what PerBlock() returns: then less is looked up.
  template <int per_block = 0>
  Floats Pick(const float* row, int64_t k) const {
    const Block& at = blocks_[k / block];
    if (per_block == 1) return Broadcast(row[at.start]);
    if (per_block) return Gather(row + k / block * per_block, lanes_[0].index, per_block);
    return Gather(row + at.start, lanes_[at.lanes].index, at.count);
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

// 8-bit activations by weights of `bits` bits in groups: sums over groups of scale * sum(x * (code -
// zero)). A lane sums its elements of a block exactly and multiplies by their scale; the rest are
// float32 additions. `per_block` is 0 where there are zero points, else that of the groups.
template <int bits, int per_block>
struct Int8ByGroups {
  // Elements that one vector holds, and each lane of it.
  static constexpr int64_t kBlock = kBytes * 8 / bits, kElements = kBlock / kLanes;
  // What is added to codes, so that they suit the instructions.
  static constexpr int kAdded = bits == 4 ? 8 : kOffset;

  const int8_t* x;        // (M, stride), of 4 bits evens then odds in each block
  const int32_t* starts;  // (M, stride / kElements): -kAdded * the activations of each lane
  const float* sums;      // the same without the factor, for zero points
  int64_t stride;
  Weights w;
  Result out;
  const LaneGroups<kBlock>& lane_groups;

  // A block of weights, with the scale and the zero point of each lane.
  struct Block {
    Bytes codes;
    Floats step, zero;
  };
  template <bool is_whole>
  Block Read(const uint8_t* from, const float* scale, int64_t n, int64_t k) const {
    const Bytes codes = bits == 4 ? LoadBytes(from) : Xor(LoadBytes(from), kOffset);
    const Floats step = lane_groups.template Pick<is_whole ? per_block : 0>(scale, k);
    if (per_block || !w.zero) return {codes, step, Broadcast(0)};
    return {codes, step, lane_groups.Pick(w.zero + n * w.G, k)};
  }

  // Adds the products of a block. All but zero points are exact: integers below 2^24.
  Floats AddTo(Floats sum, const Block& block, int64_t m, int64_t k) const {
    const int64_t at = m * stride + k;
    const Ints start = LoadInts(starts + at / kElements);
    const int8_t* in = x + at;
    Ints products;
    if constexpr (bits == 8) products = DotQuads(start, block.codes, LoadBytes(in));
    else
      products = DotNibbles(start, LowPlus8(block.codes), HighPlus8(block.codes), LoadBytes(in),
                            LoadBytes(in + kBytes));
    Floats total = ToFloats(products);
    if (!per_block && w.zero) total = NegMulAdd(block.zero, Load(sums + at / kElements), total);
    return MulAdd(total, block.step, sum);
  }

  template <int R, int C>
  NOINLINE void Tile(int64_t m, int64_t n, const Scales& scales) const {
    const int64_t K = w.K, G = w.G, ahead = Ahead(w);
    const uint8_t* rows = w.at(n, 0);
    const float* scale = scales(n);
    Floats acc[R][C];
    UNROLLED(r, R)
      UNROLLED(c, C) acc[r][c] = Broadcast(0);
    int64_t k = 0;
    for (; k + kBlock <= K; k += kBlock)
      UNROLLED(c, C) {
        const uint8_t* from = rows + (c * K + k) * bits / 8;
        Prefetch(from + ahead);
        Block block = Read<true>(from, scale + c * G, n + c, k);
        UNROLLED(r, R) acc[r][c] = AddTo(acc[r][c], block, m + r, k);
      }
    Padded<kBytes> copy;
    if (k < K)
      UNROLLED(c, C) {
        Prefetch(rows + (c * K + k) * bits / 8 + ahead);
        Block block = Read<false>(LastBlock(w, n + c, k, copy), scale + c * G, n + c, k);
        UNROLLED(r, R) acc[r][c] = AddTo(acc[r][c], block, m + r, k);
      }
    UNROLLED(r, R) {
      float sums[C];
      Sums<C>(acc[r], sums);
      for (int c = 0; c < C; ++c) out.Put(m + r, n + c, sums[c]);
    }
  }
};

// Sums of the activations of each lane, which holds `elements` of them.
inline std::vector<int32_t> SumsOfLanes(const int8_t* x, int64_t M, int64_t K, int64_t stride,
                                        int64_t elements) {
  std::vector<int32_t> sums(M * stride / elements);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t k = 0; k < K; k += elements)
      sums[(m * stride + k) / elements] = SumOf(x + m * K + k, std::min(elements, K - k));
  return sums;
}

template <int bits>
void FewRowsGroups(ThreadPool& pool, const int8_t* x, int64_t M, const Weights& w,
                   const Result& out) {
  using Kernel = Int8ByGroups<bits, 0>;
  constexpr int64_t block = Kernel::kBlock;
  const int64_t stride = (w.K + block - 1) / block * block;
  std::vector<int8_t> arranged =
      bits == 4 ? EvensThenOdds(x, M, w.K, block, stride) : WithStride(x, M, w.K, stride);
  std::vector<int32_t> starts = SumsOfLanes(x, M, w.K, stride, Kernel::kElements);
  std::vector<float> sums;
  if (w.zero) sums.assign(starts.begin(), starts.end());
  for (int32_t& start : starts) start *= -Kernel::kAdded;
  LaneGroups<block> groups(w, 0, Kernel::kElements);
  const auto run = [&](auto per_block) {
    ForTiles(pool, M, w, w.K,
             Int8ByGroups<bits, per_block()>{arranged.data(), starts.data(), sums.data(), stride, w,
                                             out, groups});
  };
  const int per_block = w.zero ? 0 : groups.PerBlock(w.K);
  if (per_block == 1) run(std::integral_constant<int, 1>());
  else if (per_block == 2) run(std::integral_constant<int, 2>());
  else if (per_block == 4) run(std::integral_constant<int, 4>());
  else run(std::integral_constant<int, 0>());
}
