// Products of few rows of float activations. Included by few_rows.h.

// Float activations, 4-bit weights in groups, each code looked up in a table of 16 floats. `per_block` is
// 1 where each quarter of a block lies in one group and there are no zero points, else 0.
template <int per_block>
struct FloatByTable {
  // Elements that one vector holds.
  static constexpr int64_t kBlock = 2 * kBytes;

  const float* x;  // (M, stride), evens then odds in each 2 * kLanes elements
  int64_t stride;
  Weights w;
  const float* table;
  float* out;
  const LaneGroups<kBlock>* lane_groups;  // for each quarter of a block

  // A quarter of a block of weights minus their zero points, with the scale of each lane.
  struct Quarter {
    Floats evens, odds, step;
  };
  Quarter Read(const Table& values, const uint8_t* from, const float* scale, int64_t n, int64_t k,
               int i) const {
    Ints pairs = NibblePairs(from + kLanes * i);
    Floats evens = values[LowNibbles(pairs)], odds = values[HighNibbles(pairs)];
    if (!per_block && w.zero) {
      Floats zero = lane_groups[i].Pick(w.zero + n * w.G, k);
      evens = Sub(evens, zero), odds = Sub(odds, zero);
    }
    return {evens, odds, lane_groups[i].template Pick<per_block>(scale, k)};
  }

  // Adds the products of a quarter with the activations at `in`.
  static Floats AddTo(Floats sum, const Quarter& part, const float* in) {
    Floats products = MulAdd(part.odds, Load(in + kLanes), Mul(part.evens, Load(in)));
    return MulAdd(products, part.step, sum);
  }

  // Adds the products of the block at k, whose codes are at `from`, to the sums of R rows.
  template <int R>
  void AddBlock(Floats (&sums)[R], const Table& values, const uint8_t* from, const float* scale,
                int64_t m, int64_t n, int64_t k) const {
    UNROLLED(i, 4) {
      Quarter part = Read(values, from, scale, n, k, i);
      UNROLLED(r, R)
        sums[r] = AddTo(sums[r], part, x + (m + r) * stride + k + 2 * kLanes * i);
    }
  }

  template <int R, int C>
  NOINLINE void Tile(int64_t m, int64_t n, const Scales& scales) const {
    const int64_t K = w.K, G = w.G, ahead = Ahead(w);
    const uint8_t* rows = w.at(n, 0);
    const float* scale = scales(n);
    const Table values(table);
    Floats acc[C][R];
    UNROLLED(c, C)
      UNROLLED(r, R) acc[c][r] = Broadcast(0);
    int64_t k = 0;
    for (; k + kBlock <= K; k += kBlock)
      UNROLLED(c, C) {
        const uint8_t* from = rows + (c * K + k) / 2;
        Prefetch(from + ahead);
        AddBlock<R>(acc[c], values, from, scale + c * G, m, n + c, k);
      }
    Padded<kBytes> copy;
    if (k < K)
      UNROLLED(c, C) {
        Prefetch(rows + (c * K + k) / 2 + ahead);
        AddBlock<R>(acc[c], values, LastBlock(w, n + c, k, copy), scale + c * G, m, n + c, k);
      }
    UNROLLED(r, R)
      UNROLLED(c, C) out[(m + r) * w.N + n + c] = Sum(acc[c][r]);
  }
};

// Float activations by 8-bit weights in groups of whole vectors, or with one scale per column.
template <bool has_zero>
struct FloatByInt8 {
  const float* x;
  Weights w;
  float* out;

  float Scale(const Scales& scales, int64_t n, int64_t g) const {
    return w.scale ? scales(n)[g] : 1;
  }
  float Zero(int64_t n, int64_t g) const { return has_zero ? w.zero[n * w.G + g] : 0; }
  Floats Read(const int8_t* from, Floats zero) const {
    Floats weights = ToFloats(Widen(from));
    return has_zero ? Sub(weights, zero) : weights;
  }

  // Stores a sum over full vectors plus the rest of the row.
  void Put(int64_t m, int64_t n, const Scales& scales, float sum) const {
    float rest = 0;
    for (int64_t k = w.K / kLanes * kLanes; k < w.K; ++k)
      rest += x[m * w.K + k] * (static_cast<int8_t>(*w.at(n, k)) - Zero(n, w.G - 1));
    out[m * w.N + n] = sum + rest * Scale(scales, n, w.G - 1);
  }

  template <int R, int C>
  void Tile(int64_t m, int64_t n, const Scales& scales) const {
    const int64_t K = w.K, group = w.group(), ahead = Ahead(w);
    Floats total[R][C];
    UNROLLED(r, R)
      UNROLLED(c, C) total[r][c] = Broadcast(0);
    for (int64_t g = 0; g < w.G; ++g) {
      Floats zero[C], part[R][C];
      UNROLLED(c, C) zero[c] = Broadcast(Zero(n + c, g));
      UNROLLED(r, R)
        UNROLLED(c, C) part[r][c] = Broadcast(0);
      for (int64_t k = g * group; k + kLanes <= std::min((g + 1) * group, K); k += kLanes)
        UNROLLED(c, C) {
          const int8_t* from = reinterpret_cast<const int8_t*>(w.at(n + c, k));
          if (k % 64 == 0) Prefetch(from + ahead);
          Floats weights = Read(from, zero[c]);
          UNROLLED(r, R)
            part[r][c] = MulAdd(weights, Load(x + (m + r) * K + k), part[r][c]);
        }
      UNROLLED(r, R)
        UNROLLED(c, C)
          total[r][c] = MulAdd(part[r][c], Broadcast(Scale(scales, n + c, g)), total[r][c]);
    }
    UNROLLED(r, R)
      UNROLLED(c, C) Put(m + r, n + c, scales, Sum(total[r][c]));
  }
};

void FewRowsLookup(ThreadPool& pool, const float* x, int64_t M, const Weights& w,
                   const float* table, float* out) {
  constexpr int64_t block = 2 * kBytes;
  const int64_t stride = (w.K + block - 1) / block * block;
  std::vector<float> arranged = EvensThenOdds(x, M, w.K, 2 * kLanes, stride);
  std::vector<LaneGroups<block>> groups;
  for (int i = 0; i < 4; ++i) groups.emplace_back(w, 2 * kLanes * i, 2);
  const auto run = [&](auto per_block) {
    ForTiles(pool, M, w, 4 * w.K,
             FloatByTable<per_block()>{arranged.data(), stride, w, table, out, groups.data()});
  };
  const auto is_one = [&](const LaneGroups<block>& quarter) { return quarter.PerBlock(w.K) == 1; };
  if (!w.zero && std::all_of(groups.begin(), groups.end(), is_one))
    run(std::integral_constant<int, 1>());
  else run(std::integral_constant<int, 0>());
}

void FewRowsWiden(ThreadPool& pool, const float* x, int64_t M, const Weights& w, float* out) {
  if (w.zero) ForTiles(pool, M, w, 4 * w.K, FloatByInt8<true>{x, w, out});
  else ForTiles(pool, M, w, 4 * w.K, FloatByInt8<false>{x, w, out});
}
