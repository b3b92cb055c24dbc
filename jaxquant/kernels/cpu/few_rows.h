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

#include "few_rows_int8.h"
#include "few_rows_groups.h"
#include "few_rows_floats.h"
