// The entry points that XLA calls through its FFI. The attribute `set` chooses the instruction set by
// its place in kSets.

#include "common.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxquant {
namespace {

// Bytes that a thread copies at least.
constexpr int64_t kLeastCopy = 1 << 17;

// Products of so many 8-bit codes fit into int32.
constexpr int64_t kLongestInt8 = (1 << 17) - 1;

// In the order of INSTRUCTIONS in library.py; null where the kernels are not compiled.
const Kernels* const kSets[] = {
#if defined(JAXQUANT_X86) && defined(JAXQUANT_AMX)
    &kAmx, &kAvx512, &kAvx2, nullptr
#elif defined(JAXQUANT_X86)
    nullptr, &kAvx512, &kAvx2, nullptr
#elif defined(JAXQUANT_ARM)
    nullptr, nullptr, nullptr, &kNeon
#else
    nullptr, nullptr, nullptr, nullptr
#endif
};

template <ffi::DataType T>
using In = ffi::Buffer<T>;
template <ffi::DataType T>
using Out = ffi::ResultBuffer<T>;

const float* OrNull(const In<ffi::F32>& values) {
  return values.element_count() ? values.typed_data() : nullptr;
}

// The elements of a matrix, or of the layer `layer` in a stack of them.
const uint8_t* MatrixOf(const ffi::AnyBuffer& x, const In<ffi::S32>& layer, int64_t bits) {
  const auto* elements = static_cast<const uint8_t*>(x.untyped_data());
  if (x.dimensions().size() == 2) return elements;
  const int64_t count = x.dimensions()[0];
  const int64_t at = std::clamp<int64_t>(layer.typed_data()[0], 0, count - 1);
  return elements + at * (x.element_count() / count) * bits / 8;
}

Weights InGroups(const ffi::AnyBuffer& w, const In<ffi::S32>& layer, int64_t K,
                 const ffi::AnyBuffer& scale, const In<ffi::F32>& zero) {
  const auto stored = scale.element_count() ? scale.element_type() : ffi::F32;
  const auto type = stored == ffi::F16    ? Weights::kFloat16
                    : stored == ffi::BF16 ? Weights::kBFloat16
                                          : Weights::kFloat32;
  const int bits = w.element_type() == ffi::S8 ? 8 : 4;
  const int64_t N = scale.dimensions()[scale.dimensions().size() - 2], G = scale.dimensions().back();
  return {MatrixOf(w, layer, bits), N, K, bits,
          MatrixOf(scale, layer, type == Weights::kFloat32 ? 32 : 16), OrNull(zero),
          std::max<int64_t>(1, G), type};
}

// Weights in groups, and the activations (M, K) that they are multiplied with. Where K is odd
// and codes have 4 bits, both are copied, with a zero at the end of each row: the kernels expect that
// rows begin with a byte.
template <typename T>
struct Operands {
  Weights weights;
  const T* x;

  Operands(const ffi::AnyBuffer& w, const In<ffi::S32>& layer, const T* x, int64_t M, int64_t K,
           const ffi::AnyBuffer& scale, const In<ffi::F32>& zero)
      : weights(InGroups(w, layer, K, scale, zero)), x(x) {
    if (weights.bits == 8 || K % 2 == 0) return;
    const int64_t bytes = (K + 1) / 2;
    rows_.resize(weights.N * bytes);
    for (int64_t n = 0; n < weights.N; ++n) {
      const uint8_t* from = weights.codes + n * K / 2;
      uint8_t* to = rows_.data() + n * bytes;
      // The last byte of a row holds one code; every other row begins with the second half of a byte.
      if (n % 2 == 0) {
        std::copy_n(from, bytes - 1, to);
        to[bytes - 1] = from[bytes - 1] & 15;
      } else {
        for (int64_t i = 0; i + 1 < bytes; ++i) to[i] = from[i] >> 4 | from[i + 1] << 4;
        to[bytes - 1] = from[bytes - 1] >> 4;
      }
    }
    inputs_.resize(M * (K + 1));
    for (int64_t m = 0; m < M; ++m) std::copy_n(x + m * K, K, inputs_.data() + m * (K + 1));
    weights.codes = rows_.data(), weights.K = K + 1, this->x = inputs_.data();
  }

 private:
  std::vector<uint8_t> rows_;
  std::vector<T> inputs_;
};

Result To(ffi::Result<ffi::AnyBuffer>& out, const In<ffi::F32>& row, const float* column) {
  Result::Type type = out->element_type() == ffi::S32   ? Result::kInt32
                      : out->element_type() == ffi::F32 ? Result::kFloat32
                                                        : Result::kBFloat16;
  return {out->untyped_data(), out->dimensions()[1], type, OrNull(row), column};
}

ffi::Error QuantizeRows(ThreadPool pool, int64_t set, int64_t qmin, int64_t qmax,
                        ffi::AnyBuffer x, Out<ffi::S8> codes, Out<ffi::F32> scale) {
  const int64_t K = x.dimensions().back(), M = scale->element_count();
  int8_t* to = codes->typed_data();
  float* scales = scale->typed_data();
  if (x.element_type() == ffi::F32)
    kSets[set]->quantize_float32(pool, x.typed_data<float>(), M, K, qmin, qmax, to, scales);
  else
    kSets[set]->quantize_bfloat16(pool, static_cast<const uint16_t*>(x.untyped_data()), M, K, qmin,
                                  qmax, to, scales);
  return ffi::Error::Success();
}

ffi::Error DotInt8(ThreadPool pool, int64_t set, In<ffi::S8> x, ffi::AnyBuffer w,
                   In<ffi::S32> layer, In<ffi::F32> row, In<ffi::F32> column,
                   ffi::Result<ffi::AnyBuffer> out) {
  const int64_t M = x.dimensions()[0], K = x.dimensions()[1], N = out->dimensions()[1];
  const Weights weights{MatrixOf(w, layer, 8), N, K, 8};
  kSets[set]->dot_int8(pool, x.typed_data(), M, weights, To(out, row, OrNull(column)));
  return ffi::Error::Success();
}

ffi::Error DotGroups(ThreadPool pool, int64_t set, In<ffi::S8> x, ffi::AnyBuffer w,
                     In<ffi::S32> layer, ffi::AnyBuffer scale, In<ffi::F32> zero,
                     In<ffi::F32> row, ffi::Result<ffi::AnyBuffer> out) {
  int64_t M = x.dimensions()[0], K = x.dimensions()[1];
  const Operands<int8_t> operands(w, layer, x.typed_data(), M, K, scale, zero);
  kSets[set]->dot_groups(pool, operands.x, M, operands.weights, To(out, row, nullptr));
  return ffi::Error::Success();
}

ffi::Error DotLookup(ThreadPool pool, int64_t set, ffi::AnyBuffer x, ffi::AnyBuffer w,
                     In<ffi::S32> layer, ffi::AnyBuffer scale, In<ffi::F32> zero,
                     In<ffi::F32> table, Out<ffi::F32> out) {
  const int64_t M = x.dimensions()[0], K = x.dimensions()[1];
  const auto run = [&](auto kernel, const auto* rows) {
    const Operands operands(w, layer, rows, M, K, scale, zero);
    kernel(pool, operands.x, M, operands.weights, table.typed_data(), out->typed_data());
    return ffi::Error::Success();
  };
  if (x.element_type() == ffi::F32) return run(kSets[set]->dot_lookup, x.typed_data<float>());
  return run(kSets[set]->dot_lookup_bfloat16, static_cast<const uint16_t*>(x.untyped_data()));
}

ffi::Error DotWiden(ThreadPool pool, int64_t set, ffi::AnyBuffer x, ffi::AnyBuffer w,
                    In<ffi::S32> layer, ffi::AnyBuffer scale, In<ffi::F32> zero,
                    Out<ffi::F32> out) {
  const int64_t M = x.dimensions()[0], K = x.dimensions()[1];
  const Weights weights = InGroups(w, layer, K, scale, zero);
  float* to = out->typed_data();
  if (x.element_type() == ffi::F32)
    kSets[set]->dot_widen(pool, x.typed_data<float>(), M, weights, to);
  else
    kSets[set]->dot_widen_bfloat16(pool, static_cast<const uint16_t*>(x.untyped_data()), M, weights,
                                   to);
  return ffi::Error::Success();
}

// Products of the rows of each expert, one of E matrices (E, N, K), by the kernel above that multiplies
// such operands. Rows of no expert become zeros.
ffi::Error RaggedDot(ThreadPool pool, int64_t set, ffi::AnyBuffer x, ffi::AnyBuffer w,
                     In<ffi::F32> scale, In<ffi::F32> zero, In<ffi::F32> row, In<ffi::F32> table,
                     In<ffi::S32> sizes, ffi::Result<ffi::AnyBuffer> out) {
  const int64_t M = x.dimensions()[0], K = x.dimensions()[1];
  const int64_t E = w.dimensions()[0], N = w.dimensions()[1], G = scale.dimensions()[2];
  const int bits = w.element_type() == ffi::S8 ? 8 : 4;
  const bool is_int8 = x.element_type() == ffi::S8;
  const int64_t width = out->element_type() == ffi::F32 ? 4 : 2;
  auto* to = static_cast<uint8_t*>(out->untyped_data());
  int64_t start = 0;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t rows = std::clamp<int64_t>(sizes.typed_data()[e], 0, M - start);
    if (rows == 0) continue;
    const Weights weights{static_cast<const uint8_t*>(w.untyped_data()) + e * N * K * bits / 8,
                          N, K, bits, scale.typed_data() + e * N * G,
                          zero.element_count() ? zero.typed_data() + e * N * G : nullptr,
                          std::max<int64_t>(1, G)};
    uint8_t* part = to + start * N * width;
    auto* floats = reinterpret_cast<float*>(part);
    if (is_int8) {
      const int8_t* in = static_cast<const int8_t*>(x.untyped_data()) + start * K;
      const Result result{part, N, width == 4 ? Result::kFloat32 : Result::kBFloat16,
                          row.element_count() ? row.typed_data() + start : nullptr};
      if (bits == 8 && G == 1 && !weights.zero && K <= kLongestInt8) {
        Weights plain{weights.codes, N, K, 8};
        kSets[set]->dot_int8(pool, in, rows, plain,
                             {part, N, result.type, result.row, weights.scales()});
      } else {
        kSets[set]->dot_groups(pool, in, rows, weights, result);
      }
    } else {
      const float* in = static_cast<const float*>(x.untyped_data()) + start * K;
      if (bits == 4)
        kSets[set]->dot_lookup(pool, in, rows, weights, table.typed_data(), floats);
      else
        kSets[set]->dot_widen(pool, in, rows, weights, floats);
    }
    start += rows;
  }
  std::memset(to + start * N * width, 0, (M - start) * N * width);
  return ffi::Error::Success();
}

using Lengths = ffi::Span<const int64_t>;

// Blocks of `lengths` along each axis, which divide those of the array.
Blocks BlocksOf(ffi::AnyBuffer::Dimensions shape, Lengths lengths) {
  const int64_t last = shape.size() - 1;
  Blocks b{shape[last], lengths.begin()[last], {0}, {}};
  Blocks::Place step{b.columns, b.columns / b.width};
  for (int64_t a = last - 1; a >= 0; --a) {
    const int64_t length = lengths.begin()[a], count = shape[a] / length;
    b.axes.insert(b.axes.begin(), {count, {length * step.element, step.block}});
    const size_t inner = b.rows.size();
    for (int64_t i = 1; i < length; ++i)
      for (size_t r = 0; r < inner; ++r) b.rows.push_back(b.rows[r] + i * step.element);
    step.element *= shape[a], step.block *= count;
  }
  return b;
}

// Runs an `Update`. `books` has the power, the count and whether there are negative values of each input
// and output, zeros for those without codes; codes are followed by their scales. `steps` has six numbers
// for each step: the operation, the slot of the result, and operands, which are slots or, if negative,
// -1 - the number of a scalar. `seed` has two words for each output, or none. `after` is not read: XLA
// computes it before.
ffi::Error UpdateBlocks(ThreadPool pool, int64_t set, int64_t inputs, int64_t slots, Lengths steps,
                        Lengths books, Lengths blocks, In<ffi::F32> scalars, In<ffi::U32> seed,
                        ffi::AnyBuffer, ffi::RemainingArgs arguments, ffi::RemainingRets results) {
  using Array = Update::Array;
  Update u;
  u.slots = slots, u.is_random = seed.element_count() > 0;
  const auto* book = books.begin();
  const auto array_of = [&](const ffi::AnyBuffer& x, auto next_scales) -> Array {
    const int64_t power = *book++, count = *book++, has_negative = *book++;
    const auto type = x.element_type();
    if (!power)
      return {type == ffi::F32 ? Array::kFloat32 : Array::kBFloat16, x.untyped_data(), nullptr, {}, {}};
    const int64_t bits = type == ffi::U8 || type == ffi::S8 ? 8 : 4;
    return {Array::kCodes, x.untyped_data(), static_cast<float*>(next_scales().untyped_data()),
            {power, bits, count, has_negative != 0}, {}};
  };
  u.blocks = BlocksOf(arguments.get<ffi::AnyBuffer>(0)->dimensions(), blocks);
  for (size_t i = 0; u.inputs.size() < static_cast<size_t>(inputs);) {
    const auto next = [&] { return *arguments.get<ffi::AnyBuffer>(i++); };
    u.inputs.push_back(array_of(next(), next));
  }
  for (size_t i = 0; i < results.size();) {
    const auto next = [&] { return **results.get<ffi::AnyBuffer>(i++); };
    u.outputs.push_back(array_of(next(), next));
  }
  if (u.is_random)
    for (size_t o = 0; o < u.outputs.size(); ++o)
      std::copy_n(seed.typed_data() + 2 * o, 2, u.outputs[o].words);
  for (const int64_t* step = steps.begin(); step != steps.end(); step += 6) {
    Update::Step made{static_cast<Update::Step::Operation>(step[0]), step[1], {}};
    for (int k = 0; k < 4; ++k)
      made.operands[k] = {step[2 + k], step[2 + k] < 0 ? scalars.typed_data() - 1 - step[2 + k] : nullptr};
    u.steps.push_back(made);
  }
  kSets[set]->update_blocks(pool, u);
  return ffi::Error::Success();
}

// Keys and values (L, B, H, S, D) of which `layer` is read. `type` is one of Attention::Type.
ffi::Error Attend(ThreadPool pool, int64_t set, int64_t type, In<ffi::F32> query,
                  ffi::AnyBuffer keys, ffi::AnyBuffer values, In<ffi::F32> table,
                  In<ffi::F32> key_scale, In<ffi::F32> value_scale, In<ffi::S32> starts,
                  In<ffi::S32> layer, Out<ffi::F32> out) {
  const auto q = query.dimensions(), k = keys.dimensions();
  const int64_t H = k[2];
  Attention a{query.typed_data(), nullptr, nullptr, static_cast<Attention::Type>(type),
              table.typed_data(), OrNull(key_scale), OrNull(value_scale), starts.typed_data(),
              out->typed_data(), q[0], q[1], H, q[2] / H, k[3], q[3]};
  int64_t at = layer.typed_data()[0];
  at = std::clamp<int64_t>(at < 0 ? at + k[0] : at, 0, k[0] - 1);
  const int64_t offset = at * a.B * H * a.S * a.bytes();
  a.keys = static_cast<const uint8_t*>(keys.untyped_data()) + offset;
  a.values = static_cast<const uint8_t*>(values.untyped_data()) + offset;
  kSets[set]->attend(pool, a);
  return ffi::Error::Success();
}

// Copies one of `count` arrays of `bytes` bytes that are stacked along an axis, once for each of the
// `outer` indices before that axis. XLA itself slices 4-bit arrays one element at a time.
ffi::Error Slice(ThreadPool pool, int64_t outer, int64_t count, int64_t bytes,
                 ffi::AnyBuffer stack, In<ffi::S32> index, ffi::Result<ffi::AnyBuffer> out) {
  const auto* from = static_cast<const uint8_t*>(stack.untyped_data());
  auto* to = static_cast<uint8_t*>(out->untyped_data());
  int64_t at = index.typed_data()[0];
  at = std::clamp<int64_t>(at < 0 ? at + count : at, 0, count - 1);
  for (int64_t i = 0; i < outer; ++i)
    Parallel(pool, bytes, kLeastCopy, 64, [=](int64_t begin, int64_t end) {
      std::memcpy(to + i * bytes + begin, from + (i * count + at) * bytes + begin, end - begin);
    });
  return ffi::Error::Success();
}

}  // namespace

#define HANDLER(name, function, binding)                                    \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                            \
      name, function,                                                       \
      ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("set") binding)
#define ARG(T) .Arg<In<ffi::T>>()
#define RET(T) .Ret<ffi::Buffer<ffi::T>>()

HANDLER(jaxquant_quantize_rows, QuantizeRows,
        .Attr<int64_t>("qmin").Attr<int64_t>("qmax").Arg<ffi::AnyBuffer>() RET(S8) RET(F32));
HANDLER(jaxquant_dot_int8, DotInt8,
        ARG(S8).Arg<ffi::AnyBuffer>() ARG(S32) ARG(F32) ARG(F32).Ret<ffi::AnyBuffer>());
HANDLER(jaxquant_dot_groups, DotGroups,
        ARG(S8).Arg<ffi::AnyBuffer>() ARG(S32).Arg<ffi::AnyBuffer>() ARG(F32) ARG(F32)
            .Ret<ffi::AnyBuffer>());
HANDLER(jaxquant_dot_lookup, DotLookup,
        .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>() ARG(S32).Arg<ffi::AnyBuffer>() ARG(F32)
            ARG(F32) RET(F32));
HANDLER(jaxquant_dot_widen, DotWiden,
        .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>() ARG(S32).Arg<ffi::AnyBuffer>() ARG(F32)
            RET(F32));
HANDLER(jaxquant_ragged_dot, RaggedDot,
        .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>() ARG(F32) ARG(F32) ARG(F32) ARG(F32)
            ARG(S32).Ret<ffi::AnyBuffer>());
HANDLER(jaxquant_attend, Attend,
        .Attr<int64_t>("type") ARG(F32).Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>() ARG(F32) ARG(F32)
            ARG(F32) ARG(S32) ARG(S32) RET(F32));
HANDLER(jaxquant_update_blocks, UpdateBlocks,
        .Attr<int64_t>("inputs").Attr<int64_t>("slots").Attr<Lengths>("steps")
            .Attr<Lengths>("books").Attr<Lengths>("blocks") ARG(F32) ARG(U32)
            .Arg<ffi::AnyBuffer>().RemainingArgs().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_slice, Slice,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("outer")
                                  .Attr<int64_t>("count")
                                  .Attr<int64_t>("bytes")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<In<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());

// Number i of the version of jaxlib whose headers this was compiled with.
extern "C" int jaxquant_jaxlib(int i) {
  constexpr int version[] = {JAXQUANT_JAXLIB};
  return version[i];
}

// The checksum of the sources that this was compiled from.
extern "C" unsigned jaxquant_sources() { return JAXQUANT_SOURCES; }

// Whether this processor supports an instruction set of kSets.
extern "C" int jaxquant_has(int set) { return kSets[set] && kSets[set]->is_supported(); }

}  // namespace jaxquant
