// Products of many rows of activations by codes, with AVX2. Included by avx2.cc within its namespace.
//
// The weights of 16 columns are rearranged in the cache, once for all rows, into a panel: two vectors of
// 8 columns, one column per lane, for each step along K. A lane holds 2 codes of 8 bits as 16-bit
// integers, or 4 codes of 4 bits as bytes.

constexpr int kVectors = 2;
constexpr int64_t kPanel = kVectors * kLanes;
// Rows of a tile: with 2 vectors of columns, 12 accumulators.
constexpr int64_t kTileRows = 6;
// Elements along K for which a panel stays in the L2 cache.
constexpr int64_t kDepth = 2048;

// How codes of 8 bits are multiplied: in pairs, exactly. Sums over kMost elements are exact as floats.
struct Pairs {
  static constexpr int64_t kCodes = 2, kMost = 256;
  static constexpr float kAdded = 0;
  // 16 bytes of a row.
  static Ints Widen(const uint8_t* from) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static int32_t Join(const int8_t* x) {
    return static_cast<uint16_t>(x[0]) | static_cast<uint32_t>(static_cast<uint16_t>(x[1])) << 16;
  }
  static Ints Add(Ints acc, Ints w, Ints x) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(w, x));
  }
  static Ints Total(Ints acc) { return acc; }
};

// How codes of 4 bits, plus 8, are multiplied: in quads, whose sums over kMost elements fit into 16 bits.
struct Quads {
  static constexpr int64_t kCodes = 4, kMost = 8 * kCodes;
  static constexpr float kAdded = 8;
  // 16 bytes of a row.
  static Ints Widen(const uint8_t* from) {
    Ints wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return Low(Xor(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)), 8));
  }
  static int32_t Join(const int8_t* x) {
    int32_t quad;
    std::memcpy(&quad, x, 4);
    return quad;
  }
  static Ints Add(Ints acc, Ints w, Ints x) {
    return _mm256_add_epi16(acc, _mm256_maddubs_epi16(w, x));
  }
  static Ints Total(Ints acc) { return _mm256_madd_epi16(acc, _mm256_set1_epi16(1)); }
};
// Transposes 8 rows of 8 lanes.
inline void Transpose(Ints (&x)[8]) {
  Ints y[8];
  for (int i = 0; i < 8; i += 2) {
    y[i] = _mm256_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm256_unpacklo_epi64(y[i + j], y[i + 2 + j]);
      x[i + 2 * j + 1] = _mm256_unpackhi_epi64(y[i + j], y[i + 2 + j]);
    }
  for (int j = 0; j < 4; ++j) {
    y[j] = _mm256_permute2x128_si256(x[j], x[4 + j], 0x20);
    y[4 + j] = _mm256_permute2x128_si256(x[j], x[4 + j], 0x31);
  }
  for (int j = 0; j < 8; ++j) x[j] = y[j];
}

// Fills a panel with the codes k to end of the columns from n on: two vectors for each step.
template <typename Codes>
inline void Pack(const Weights& w, int64_t n, int64_t k, int64_t end, Ints* panel) {
  constexpr int64_t size = kLanes * Codes::kCodes;
  for (int v = 0; v < kVectors; ++v)
    for (int64_t at = k; at < end; at += size) {
      Ints lanes[8];
      for (int i = 0; i < 8; ++i) {
        const uint8_t* from = w.at(std::min(n + v * kLanes + i, w.N - 1), at);
        const int64_t left = (w.K - at) * w.bits / 8;
        lanes[i] = Codes::Widen(left < 16 ? Padded<16>(from, left).bytes : from);
      }
      Transpose(lanes);
      for (int i = 0; i < 8; ++i)
        panel[((at - k) / Codes::kCodes + i) * kVectors + v] = lanes[i];
    }
}

// Activations as steps along K, with zeros beyond it.
template <typename Codes>
std::vector<int32_t> Steps(const int8_t* x, int64_t M, int64_t K) {
  const int64_t whole = K / Codes::kCodes, steps = (K + Codes::kCodes - 1) / Codes::kCodes;
  std::vector<int32_t> joined(M * steps);
  for (int64_t m = 0; m < M; ++m, x += K) {
    int32_t* to = joined.data() + m * steps;
    for (int64_t s = 0; s < whole; ++s) to[s] = Codes::Join(x + s * Codes::kCodes);
    int8_t rest[Codes::kCodes] = {};
    std::copy(x + whole * Codes::kCodes, x + K, rest);
    if (whole < steps) to[whole] = Codes::Join(rest);
  }
  return joined;
}

// The products of R rows, `stride` steps apart, by steps of a panel.
template <typename Codes, int R>
NOINLINE void SumSteps(Ints (&sums)[R][kVectors], const int32_t* x, int64_t stride,
                       const Ints* panel, int64_t steps) {
  Ints acc[R][kVectors];
  UNROLLED(r, R)
    UNROLLED(v, kVectors) acc[r][v] = ZeroInts();
  for (int64_t s = 0; s < steps; ++s, panel += kVectors) {
    Ints w[kVectors];
    UNROLLED(v, kVectors) w[v] = panel[v];
    UNROLLED(r, R) {
      const Ints in = _mm256_set1_epi32(x[r * stride + s]);
      UNROLLED(v, kVectors) acc[r][v] = Codes::Add(acc[r][v], w[v], in);
    }
  }
  UNROLLED(r, R)
    UNROLLED(v, kVectors) sums[r][v] = Codes::Total(acc[r][v]);
}

// Runs a tile over all rows.
template <typename Tile>
inline void ForRows(int64_t M, const Tile& tile) {
  int64_t m = 0;
  for (; m + kTileRows <= M; m += kTileRows) tile.template Run<kTileRows>(m);
  for (; m + 2 <= M; m += 2) tile.template Run<2>(m);
  if (m < M) tile.template Run<1>(m);
}

// Stores sums of 8 columns.
template <typename Sum>
inline void PutLanes(const Result& to, int64_t m, int64_t n, const Sum* sums) {
  for (int64_t i = 0; i < std::min(kLanes, to.N - n); ++i) to.Put(m, n + i, sums[i]);
}
inline void Put(const Result& to, int64_t m, int64_t n, Floats sum) {
  if (to.type != Result::kFloat32 || to.N - n < kLanes) {
    alignas(32) float lanes[kLanes];
    _mm256_store_ps(lanes, sum);
    return PutLanes(to, m, n, lanes);
  }
  if (to.row) sum = Mul(sum, Broadcast(to.row[m]));
  if (to.column) sum = Mul(sum, Load(to.column + n));
  _mm256_storeu_ps(static_cast<float*>(to.out) + m * to.N + n, sum);
}
inline void Put(const Result& to, int64_t m, int64_t n, Ints sum) {
  if (to.type != Result::kInt32) return Put(to, m, n, ToFloats(sum));
  alignas(32) int32_t lanes[kLanes];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum);
  PutLanes(to, m, n, lanes);
}

// Sums of codes over a part of K, added to those of earlier parts.
struct Int8Tile {
  const int32_t* x;
  int64_t stride, first, count, n;  // the panel holds `count` steps, starting at `first`
  const Ints* panel;
  Ints* part;  // (M, kVectors): the sums of earlier parts, unless this is the first
  const Result& out;

  template <int R>
  void Run(int64_t m) const {
    Ints sums[R][kVectors];
    SumSteps<Pairs, R>(sums, x + m * stride + first, stride, panel, count);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = (m + r) * kVectors + v;
        if (first) sums[r][v] = Add(sums[r][v], part[at]);
        if (first + count == stride) Put(out, m + r, n + v * kLanes, sums[r][v]);
        else part[at] = sums[r][v];
      }
  }
};

void PanelInt8(ThreadPool& pool, const int8_t* x, int64_t M, const Weights& w, const Result& out) {
  const std::vector<int32_t> steps = Steps<Pairs>(x, M, w.K);
  const int64_t stride = steps.size() / M;
  Parallel(pool, w.N, kPanel, kPanel, [&](int64_t begin, int64_t end) {
    Ints* panel = Scratch<Ints>(0, kVectors * kDepth / Pairs::kCodes);
    Ints* part = Scratch<Ints>(2, w.K > kDepth ? M * kVectors : 0);
    for (int64_t n = begin; n < end; n += kPanel)
      for (int64_t k = 0; k < w.K; k += kDepth) {
        const int64_t last = std::min(k + kDepth, w.K), first = k / Pairs::kCodes;
        Pack<Pairs>(w, n, k, last, panel);
        const int64_t count = std::min(last / Pairs::kCodes + last % Pairs::kCodes, stride) - first;
        ForRows(M, Int8Tile{steps.data(), stride, first, count, n, panel, part, out});
      }
  });
}

// A part of a group with an exact sum of products: `steps` steps from `first` on.
struct GroupPart {
  int64_t first, steps, group;
};

// The parts of the groups of a row of weights, none of which lies in two panels.
template <typename Codes>
std::vector<GroupPart> PartsOf(const Weights& w) {
  std::vector<GroupPart> parts;
  for (int64_t k = 0, end; k < w.K; k = end) {
    const int64_t group = std::min(k / w.group(), w.G - 1);
    end = std::min(k + Codes::kMost, (k / kDepth + 1) * kDepth);
    end = std::min(end, group + 1 < w.G ? (group + 1) * w.group() : w.K);
    parts.push_back({k / Codes::kCodes, (end - k + Codes::kCodes - 1) / Codes::kCodes, group});
  }
  return parts;
}

// Adds the sums of the parts of groups within one panel to those before.
template <typename Codes>
struct GroupsTile {
  const int32_t* x;
  int64_t stride, n;
  const float* sums;  // (M, parts): of the activations of each part
  const std::vector<GroupPart>& parts;
  int64_t first, last;
  const Ints* panel;  // of the parts from first to last
  const Floats *scale, *zero;  // (parts, kVectors); zero points of unsigned codes
  Floats* total;  // (M, kVectors)
  const Result& out;

  template <int R>
  void Run(int64_t m) const {
    const int64_t count = parts.size();
    const Ints* steps = panel;
    if (!first) std::fill_n(total + m * kVectors, R * kVectors, Broadcast(0));
    for (int64_t p = first; p < last; ++p) {
      Ints products[R][kVectors];
      SumSteps<Codes, R>(products, x + m * stride + parts[p].first, stride, steps, parts[p].steps);
      steps += parts[p].steps * kVectors;
      UNROLLED(r, R) {
        const Floats sum = Broadcast(sums[(m + r) * count + p]);
        UNROLLED(v, kVectors) {
          // Exact: integers below 2^24.
          Floats centered = NegMulAdd(zero[p * kVectors + v], sum, ToFloats(products[r][v]));
          Floats& to = total[(m + r) * kVectors + v];
          to = MulAdd(centered, scale[p * kVectors + v], to);
        }
      }
    }
    for (int64_t i = m; i < m + R && last == count; ++i)
      for (int v = 0; v < kVectors; ++v) Put(out, i, n + v * kLanes, total[i * kVectors + v]);
  }
};

// The scales and zero points of the columns of a panel, from n on, for each part of a group.
inline void PackScales(const Weights& w, float added, int64_t n,
                       const std::vector<GroupPart>& parts, float* scale, float* zero) {
  for (const GroupPart& part : parts)
    for (int64_t i = 0; i < kPanel; ++i) {
      const int64_t at = std::min(n + i, w.N - 1) * w.G + part.group;
      *scale++ = w.scales()[at];
      *zero++ = added + (w.zero ? w.zero[at] : 0);
    }
}

template <typename Codes>
void PanelGroups(ThreadPool& pool, const int8_t* x, int64_t M, const Weights& w,
                 const Result& out) {
  const std::vector<GroupPart> parts = PartsOf<Codes>(w);
  const int64_t count = parts.size();
  std::vector<float> sums(M * count);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t p = 0; p < count; ++p) {
      const int64_t k = parts[p].first * Codes::kCodes;
      const int64_t end = std::min(k + parts[p].steps * Codes::kCodes, w.K);
      sums[m * count + p] = SumOf(x + m * w.K + k, end - k);
    }
  const std::vector<int32_t> steps = Steps<Codes>(x, M, w.K);
  Parallel(pool, w.N, kPanel, kPanel, [&](int64_t begin, int64_t end) {
    Ints* panel = Scratch<Ints>(0, kVectors * kDepth / Codes::kCodes);
    Floats *scale = Scratch<Floats>(1, 2 * count * kVectors), *zero = scale + count * kVectors;
    Floats* total = Scratch<Floats>(2, M * kVectors);
    for (int64_t n = begin; n < end; n += kPanel) {
      PackScales(w, Codes::kAdded, n, parts, reinterpret_cast<float*>(scale),
                 reinterpret_cast<float*>(zero));
      for (int64_t first = 0, last; first < count; first = last) {
        const int64_t k = parts[first].first * Codes::kCodes;
        const int64_t k1 = std::min((k / kDepth + 1) * kDepth, w.K);
        for (last = first + 1; last < count && parts[last].first * Codes::kCodes < k1;) ++last;
        Pack<Codes>(w, n, k, k1, panel);
        ForRows(M, GroupsTile<Codes>{steps.data(), static_cast<int64_t>(steps.size()) / M, n, sums.data(),
                            parts, first, last, panel, scale, zero, total, out});
      }
    }
  });
}
