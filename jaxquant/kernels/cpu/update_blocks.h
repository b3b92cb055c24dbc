// Elementwise steps over arrays, some of them in blocks of codes. Included by avx512.cc, avx2.cc and
// neon.cc within their namespaces, after power_blocks.h.
//
// A tile of whole blocks is computed row by row, so that what a step computes stays in the L1 cache;
// only values to encode wait for the last row, whose magnitudes their scales may depend on.

// Elements that a thread updates at least.
constexpr int64_t kUpdatedAtOnce = 1 << 15;
// Columns of a tile, about as many, so that values to encode stay in the L2 cache. Tiles begin with a
// cache line of codes, of 4 bits or more, where rows do.
constexpr int64_t kStretch = 512, kStretchMultiple = 128;
constexpr int64_t kVector = 16;

// Loops over vectors, one per operation. Scalars are read once.
template <bool first_is_row, bool second_is_row, typename F>
NOINLINE void Both(F f, int64_t size, const float* __restrict a, const float* __restrict b,
                   float* __restrict out) {
  const float x = *a, y = *b;
  for (int64_t i = 0; i < size; ++i) out[i] = f(first_is_row ? a[i] : x, second_is_row ? b[i] : y);
}

template <typename F>
inline void Binary(F f, const Update::Step& step, int64_t size, const float* a, const float* b,
                   float* out) {
  if (step.operands[0].slot < 0) Both<false, true>(f, size, a, b, out);
  else if (step.operands[1].slot < 0) Both<true, false>(f, size, a, b, out);
  else Both<true, true>(f, size, a, b, out);
}

template <typename F>
NOINLINE void Unary(F f, int64_t size, const float* __restrict a, float* __restrict out) {
  for (int64_t i = 0; i < size; ++i) out[i] = f(a[i]);
}

// The sum of two rows, each times a scalar.
NOINLINE inline void Combine(int64_t size, const float* __restrict a, float of_a,
                             const float* __restrict b, float of_b, float* __restrict out) {
  for (int64_t i = 0; i < size; ++i) out[i] = a[i] * of_a + b[i] * of_b;
}

NOINLINE inline void Select(const Update::Step& step, int64_t size, const float* const* operands,
                            float* __restrict out) {
  const auto value = [&](int k, int64_t i) {
    return operands[k][step.operands[k].slot < 0 ? 0 : i];
  };
  for (int64_t i = 0; i < size; ++i) out[i] = value(0, i) != 0 ? value(2, i) : value(1, i);
}

// The nearest bfloat16, ties to even.
inline float RoundToBFloat16(float x) {
  const uint32_t bits = BitsOf(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  return FloatOf((bits & kMagnitude) > kInfinity ? kNaN : rounded);
}

inline void RunStep(const Update::Step& step, int64_t size, const float* const* operands,
                    float* out) {
  using Step = Update::Step;
  const auto both = [&](auto f) { Binary(f, step, size, operands[0], operands[1], out); };
  const auto one = [&](auto f) { Unary(f, size, operands[0], out); };
  switch (step.operation) {
    case Step::kCopy: return one([](float x) { return x; });
    case Step::kNegate: return one([](float x) { return -x; });
    case Step::kMagnitude: return one([](float x) { return FloatOf(BitsOf(x) & kMagnitude); });
    case Step::kRoot: return one([](float x) { return std::sqrt(x); });
    // Zeros and NaN stay as they are.
    case Step::kSign: return one([](float x) { return x > 0 ? 1.f : x < 0 ? -1.f : x; });
    case Step::kRoundToBFloat16: return one(RoundToBFloat16);
    case Step::kAdd: return both([](float x, float y) { return x + y; });
    case Step::kSubtract: return both([](float x, float y) { return x - y; });
    case Step::kMultiply: return both([](float x, float y) { return x * y; });
    case Step::kDivide: return both([](float x, float y) { return x / y; });
    // NaN of either operand is the result.
    case Step::kMaximum: return both([](float x, float y) { return x > y || x != x ? x : y; });
    case Step::kMinimum: return both([](float x, float y) { return x < y || x != x ? x : y; });
    case Step::kEqual: return both([](float x, float y) { return x == y ? 1.f : 0.f; });
    case Step::kLess: return both([](float x, float y) { return x < y ? 1.f : 0.f; });
    case Step::kLessOrEqual: return both([](float x, float y) { return x <= y ? 1.f : 0.f; });
    case Step::kSelect: return Select(step, size, operands, out);
    case Step::kCombine:
      return Combine(size, operands[0], *operands[1], operands[2], *operands[3], out);
  }
}

// Elements of an array from `at` on, as bytes.
inline uint8_t* BytesOf(const Update::Array& x, int64_t at) {
  const int64_t bits = x.type == x.kFloat32 ? 32 : x.type == x.kBFloat16 ? 16 : x.book.bits;
  return x.as<uint8_t>() + at * bits / 8;
}

inline void Widen(const uint16_t* __restrict x, int64_t size, float* __restrict out) {
  for (int64_t i = 0; i < size; ++i) out[i] = FloatOf(BitsOf(x[i]));
}
inline void Narrow(const float* __restrict x, int64_t size, uint16_t* __restrict out) {
  for (int64_t i = 0; i < size; ++i) out[i] = BitsOf(RoundToBFloat16(x[i])) >> 16;
}

// One tile of whole blocks, of `size` columns.
class UpdatedTile {
 public:
  UpdatedTile(const Update& u, const Blocks::Place& place, int64_t size)
      : u_(u),
        place_(place),
        size_(size),
        stride_((size + kVector - 1) / kVector * kVector),
        inputs_(u.inputs.size()),
        outputs_(u.outputs.size()),
        rows_(u.blocks.rows.size()),
        own_(Scratch<float>(0, (u.slots + inputs_ + outputs_ + 2) * stride_)),
        tiles_(Scratch<float>(1, outputs_ * rows_ * stride_)),
        bytes_(Scratch<uint8_t>(2, size)) {}

  void Run() {
    for (int64_t i = 0; i < inputs_; ++i)
      if (const auto& x = u_.inputs[i]; x.type == x.kCodes)
        FillScales(x.scales + place_.block, size_, u_.blocks.width, OwnRow(u_.slots + i));
    std::memset(Magnitudes(0), 0, outputs_ * stride_ * sizeof(uint32_t));
    for (int64_t r = 0; r < rows_; ++r) ComputeRow(r);
    for (int64_t o = 0; o < outputs_; ++o)
      if (u_.outputs[o].type == Update::Array::kCodes) EncodeOutput(o);
  }

 private:
  float* OwnRow(int64_t i) { return own_ + i * stride_; }
  float* TileRow(int64_t o, int64_t r) { return tiles_ + (o * rows_ + r) * stride_; }
  uint32_t* Magnitudes(int64_t o) {
    return reinterpret_cast<uint32_t*>(OwnRow(u_.slots + inputs_ + o));
  }
  int64_t First(int64_t r) { return place_.element + u_.blocks.rows[r]; }

  // The row of a slot, where its array has it if that is of float32.
  float* RowOf(int64_t slot, int64_t r) {
    const int64_t o = slot - inputs_;
    if (o >= outputs_) return OwnRow(slot);
    const auto& x = o < 0 ? u_.inputs[slot] : u_.outputs[o];
    if (x.type == x.kFloat32) return x.as<float>() + First(r);
    return o >= 0 && x.type == x.kCodes ? TileRow(o, r) : OwnRow(slot);
  }

  void ReadInput(int64_t i, int64_t r) {
    const auto& x = u_.inputs[i];
    if (x.type == x.kBFloat16) Widen(x.as<uint16_t>() + First(r), size_, OwnRow(i));
    if (x.type != x.kCodes) return;
    const uint8_t* codes = BytesOf(x, First(r));
    if (x.book.bits == 4) UnpackNibbles(codes, size_, bytes_), codes = bytes_;
    DecoderOf(x.book)(codes, size_, OwnRow(u_.slots + i), x.book.count, OwnRow(i));
  }

  void ComputeRow(int64_t r) {
    for (int64_t i = 0; i < inputs_; ++i) ReadInput(i, r);
    for (const Update::Step& step : u_.steps) {
      const float* operands[4];
      for (int k = 0; k < 4; ++k) {
        const auto& of = step.operands[k];
        operands[k] = of.slot < 0 ? of.scalar : RowOf(of.slot, r);
      }
      RunStep(step, size_, operands, RowOf(step.out, r));
    }
    for (int64_t o = 0; o < outputs_; ++o) {
      const auto& x = u_.outputs[o];
      if (x.type == x.kCodes) MagnitudesOf(TileRow(o, r), size_, Magnitudes(o));
      if (x.type == x.kBFloat16)
        Narrow(OwnRow(inputs_ + o), size_, x.as<uint16_t>() + First(r));
    }
  }

  void EncodeOutput(int64_t o) {
    const auto& x = u_.outputs[o];
    float* inverse = OwnRow(u_.slots + inputs_ + outputs_);
    auto* kept = reinterpret_cast<uint32_t*>(inverse + stride_);
    ScalesOf(Magnitudes(o), size_, u_.blocks.width, x.scales + place_.block, inverse, kept);
    for (int64_t r = 0; r < rows_; ++r) {
      uint8_t* codes = BytesOf(x, First(r));
      EncoderOf(x.book, u_.is_random)(TileRow(o, r), size_, inverse, kept, x.book.count, First(r),
                                      x.words[0], x.words[1], x.book.bits == 8 ? codes : bytes_);
      if (x.book.bits == 4) PackNibbles(bytes_, size_, codes);
    }
  }

  const Update& u_;
  const Blocks::Place place_;
  const int64_t size_, stride_, inputs_, outputs_, rows_;
  float *own_, *tiles_;
  uint8_t* bytes_;
};

void UpdateBlocks(ThreadPool& pool, const Update& u) {
  // Whole blocks, and tiles of about equal sizes.
  const Blocks& b = u.blocks;
  const int64_t multiple = std::lcm<int64_t>(b.width, kStretchMultiple);
  const int64_t count = std::max<int64_t>(1, (b.columns + kStretch / 2) / kStretch);
  const int64_t share = (b.columns + count - 1) / count;
  const int64_t tile = std::min((share + multiple - 1) / multiple * multiple, b.columns);
  const int64_t tiles = (b.columns + tile - 1) / tile;
  const int64_t size = tile * static_cast<int64_t>(b.rows.size());
  const int64_t least = std::max<int64_t>(1, kUpdatedAtOnce / size);
  Parallel(pool, b.outer() * tiles, least, 1, [=, &u](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t column = i % tiles * tile;
      Blocks::Place place = u.blocks.At(i / tiles);
      place.element += column, place.block += column / u.blocks.width;
      UpdatedTile(u, place, std::min(tile, u.blocks.columns - column)).Run();
    }
  });
}
