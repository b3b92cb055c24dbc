// Products of few rows of 8-bit activations by 8-bit weights with one scale per column. Included by few_rows.h.

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

  // Sums over full vectors.
  template <int R, int C>
  NOINLINE void AddVectors(Ints (&sum)[R][C], int64_t m, int64_t n) const {
    const int64_t K = w.K, ahead = Ahead(w);
    const uint8_t* rows = w.at(n, 0);
    Ints acc[R][C];
    UNROLLED(r, R)
      UNROLLED(c, C) acc[r][c] = ZeroInts();
    for (int64_t k = 0; k + kBytes <= K; k += kBytes)
      UNROLLED(c, C) {
        const uint8_t* from = rows + c * K + k;
        Prefetch(from + ahead);
        Bytes weights = Xor(LoadBytes(from), kOffset);
        UNROLLED(r, R) acc[r][c] = Dot(acc[r][c], weights, LoadBytes(x + (m + r) * K + k));
      }
    UNROLLED(r, R)
      UNROLLED(c, C) sum[r][c] = acc[r][c];
  }

  template <int R, int C>
  void Tile(int64_t m, int64_t n, const Scales&) const {
    Ints acc[R][C];
    AddVectors<R, C>(acc, m, n);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) Put(m + r, n + c, acc[r][c]);
  }
};

void FewRowsInt8(ThreadPool& pool, const int8_t* x, int64_t M, const Weights& w,
                 const Result& out) {
  std::vector<int32_t> sums = SumsOf<int32_t>(x, M, w.K);
  ForTiles(pool, M, w, w.K, Int8ByInt8{x, sums.data(), w, out});
}
