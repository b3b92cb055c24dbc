// Products of many rows with AMX. Included by avx512.cc within its namespace, after panels_avx512.h,
// whose panels consist of tiles: 16 quads of 16 columns each.
//
// Tiles 0 to 3 are the sums of a block of 32 rows by 32 columns, 4 and 5 its rows, 6 and 7 its columns.

constexpr int64_t kTile = 16, kBlock = 2 * kTile;
// Bytes of a row in a tile: those of one step along K.
constexpr int64_t kStep = 64;
// Rows from which tiles multiply, and elements of a group: each group costs a scaled addition.
constexpr int64_t kTiledRows = 16, kTiledGroup = 32;

// The sums of a block, in int32 or float32.
template <typename T>
struct alignas(64) BlockSums {
  T at[kBlock][kBlock];
};

// Multiplies `steps` steps of a block of rows by those of a panel.
template <typename T>
NOINLINE void MultiplyBlock(const CacheLine* rows, const uint8_t* panel, int64_t steps,
                            BlockSums<T>& sums) {
  constexpr int64_t kStride = sizeof(sums.at[0]);
  Tiles::Zero<0>(), Tiles::Zero<1>(), Tiles::Zero<2>(), Tiles::Zero<3>();
  for (; steps > 0; --steps, rows += kBlock, panel += kTile * 4 * kPanel) {
    Tiles::Load<4>(rows, kStep), Tiles::Load<5>(rows + kTile, kStep);
    Tiles::Load<6>(panel, 4 * kPanel), Tiles::Load<7>(panel + kBytes, 4 * kPanel);
    if constexpr (std::is_integral_v<T>) {
      Tiles::DotBytes<0, 4, 6>(), Tiles::DotBytes<1, 4, 7>();
      Tiles::DotBytes<2, 5, 6>(), Tiles::DotBytes<3, 5, 7>();
    } else {
      Tiles::DotHalves<0, 4, 6>(), Tiles::DotHalves<1, 4, 7>();
      Tiles::DotHalves<2, 5, 6>(), Tiles::DotHalves<3, 5, 7>();
    }
  }
  Tiles::Store<0>(sums.at[0], kStride), Tiles::Store<1>(sums.at[0] + kTile, kStride);
  Tiles::Store<2>(sums.at[kTile], kStride), Tiles::Store<3>(sums.at[kTile] + kTile, kStride);
}

// Rows of activations in the order in which tiles are loaded: for each block of rows, all rows of the
// first step, then of the next. Beyond the rows and beyond each part along K are zeros, so what a panel
// holds there does not count.
struct TileRows {
  int64_t M;
  std::vector<int64_t> steps;  // where they start in a row, in bytes, and the end
  std::vector<int64_t> first;  // steps of the parts, and the end
  std::vector<CacheLine> lines{};

  // Rows of bytes, divided into parts.
  TileRows(ThreadPool& pool, const void* x, int64_t M, const std::vector<int64_t>& parts) : M(M) {
    for (size_t p = 0; p + 1 < parts.size(); ++p) {
      first.push_back(steps.size());
      for (int64_t at = parts[p]; at < parts[p + 1]; at += kStep) steps.push_back(at);
    }
    const int64_t count = steps.size(), blocks = (M + kBlock - 1) / kBlock;
    first.push_back(count), steps.push_back(parts.back());
    lines.resize(blocks * count * kBlock);
    Parallel(pool, blocks, 2, 1, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin * kBlock; m < std::min(end * kBlock, M); ++m) {
        const uint8_t* row = static_cast<const uint8_t*>(x) + m * steps.back();
        CacheLine* to = lines.data() + m / kBlock * count * kBlock + m % kBlock;
        for (int64_t s = 0; s < count; ++s)
          std::memcpy(to + s * kBlock, row + steps[s], steps[s + 1] - steps[s]);
      }
    });
  }

  // The block of rows that starts at m, from a step on.
  const CacheLine* At(int64_t m, int64_t step) const {
    return lines.data() + m * (steps.size() - 1) + step * kBlock;
  }

  // Calls work(m, rows, v) for blocks of the rows m, ... by the vectors v and v + 1 of a panel, as far as
  // they have columns.
  template <typename Work>
  static void ForBlocks(int64_t begin, int64_t end, int64_t columns, const Work& work) {
    for (int64_t m = begin, before = 0; m < end; m += kBlock) {
      const int64_t rows = std::min(kBlock, end - m);
      if (rows != before) Configure(rows);
      before = rows;
      for (int v = 0; v < kVectors && v * kLanes < columns; v += 2) work(m, rows, v);
    }
    Tiles::Release();
  }

  // A tile without rows faults, so one that no row needs has one row, whose results are not read.
  static void Configure(int64_t rows) {
    TileShapes shapes;
    for (int t = 0; t < 8; ++t) {
      const int64_t before = kTile * (t < 4 ? t / 2 : t - 4);
      shapes.rows[t] = t < 6 ? std::clamp<int64_t>(rows - before, 1, kTile) : kTile;
      shapes.bytes[t] = kStep;
    }
    Tiles::Configure(shapes);
  }

  void Multiply(const Int8Panel& by) const {
    ForBlocks(0, M, by.out.N - by.n, [&](int64_t m, int64_t rows, int v) {
      BlockSums<int32_t> sums;
      const int64_t count = (by.count + kTile - 1) / kTile;
      MultiplyBlock(At(m, by.first / kTile), by.codes + v * kBytes, count, sums);
      for (int64_t r = 0; r < rows; ++r)
        for (int j = 0; j < 2; ++j) {
          Ints sum = LoadBytes(sums.at[r] + j * kLanes);
          by.Finish(m + r, v + j, Add(by.Start(m + r, v + j), sum));
        }
    });
  }

  void Multiply(const GroupsPanel& by) const {
    ForBlocks(0, M, by.out.N - by.n, [&](int64_t m, int64_t rows, int v) {
      BlockSums<float> total{};
      BlockSums<int32_t> sums;
      for (int64_t p = by.first; p < by.last; ++p) {
        MultiplyBlock(At(m, first[p]), by.At(p) + v * kBytes, first[p + 1] - first[p], sums);
        for (int j = 0; j < 2; ++j) {
          const Affine columns = by.Columns(p, v + j);
          for (int64_t r = 0; r < rows; ++r) {
            float* sum = total.at[r] + j * kLanes;
            Ints codes = LoadBytes(sums.at[r] + j * kLanes);
            Store(sum, columns.Add(Load(sum), codes, by.Activations(m + r, p)));
          }
        }
      }
      for (int64_t r = 0; r < rows; ++r)
        for (int j = 0; j < 2; ++j) by.Finish(m + r, v + j, Load(total.at[r] + j * kLanes));
    });
  }
};
