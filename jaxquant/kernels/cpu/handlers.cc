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

// Blocks of a window of `shape` in an array of codes, from the element at `starts`, a multiple of the
// lengths of the blocks.
PowerBlocks BlocksOf(const ffi::AnyBuffer& codes, ffi::AnyBuffer::Dimensions shape, int64_t power,
                     int64_t count, bool has_negative, Lengths lengths,
                     const In<ffi::S32>& starts) {
  const auto whole = codes.dimensions();
  const int64_t last = shape.size() - 1;
  PowerBlocks b{};
  const auto type = codes.element_type();
  b.power = power, b.bits = type == ffi::U8 || type == ffi::S8 ? 8 : 4;
  b.has_negative = has_negative, b.count = count;
  b.columns = shape[last], b.width = lengths.begin()[last];
  b.rows = {{0, 0, 0}};
  PowerBlocks::Place step{1, 1, 1};
  for (int64_t a = last; a >= 0; --a) {
    const int64_t length = lengths.begin()[a], blocks = whole[a] / length;
    // As dynamic_slice clamps them.
    const int64_t start = std::clamp<int64_t>(starts.typed_data()[a], 0, whole[a] - shape[a]);
    b.start.codes += start * step.codes, b.start.scale += start / length * step.scale;
    if (a < last) {
      b.axes.insert(b.axes.begin(), {shape[a] / length,
                                     {length * step.codes, length * step.values, step.scale}});
      const size_t inner = b.rows.size();
      for (int64_t i = 1; i < length; ++i)
        for (size_t r = 0; r < inner; ++r)
          b.rows.push_back({b.rows[r].codes + i * step.codes, b.rows[r].values + i * step.values, 0});
    }
    step.codes *= whole[a], step.values *= shape[a], step.scale *= blocks;
  }
  return b;
}

// Encodes a window. The arrays of which it is a part share memory with the results, or are empty; `seed`
// has no words, or two random ones.
ffi::Error EncodePowers(ThreadPool pool, int64_t set, int64_t power, int64_t count,
                        bool has_negative, Lengths blocks, In<ffi::F32> x, In<ffi::S32> starts,
                        In<ffi::U32> seed, ffi::AnyBuffer, ffi::AnyBuffer,
                        ffi::Result<ffi::AnyBuffer> codes, Out<ffi::F32> scale) {
  PowerBlocks b = BlocksOf(*codes, x.dimensions(), power, count, has_negative, blocks, starts);
  if ((b.is_random = seed.element_count() == 2))
    b.first = seed.typed_data()[0], b.second = seed.typed_data()[1];
  kSets[set]->encode_powers(pool, b, x.typed_data(), static_cast<uint8_t*>(codes->untyped_data()),
                            scale->typed_data());
  return ffi::Error::Success();
}

// Decodes a window. `after` is not read: XLA computes it before.
ffi::Error DecodePowers(ThreadPool pool, int64_t set, int64_t power, int64_t count,
                        bool has_negative, Lengths blocks, ffi::AnyBuffer codes,
                        In<ffi::F32> scale, In<ffi::S32> starts, ffi::AnyBuffer,
                        Out<ffi::F32> x) {
  const PowerBlocks b =
      BlocksOf(codes, x->dimensions(), power, count, has_negative, blocks, starts);
  kSets[set]->decode_powers(pool, b, static_cast<const uint8_t*>(codes.untyped_data()),
                            scale.typed_data(), x->typed_data());
  return ffi::Error::Success();
}

// Leaves a result as it is. XLA computes the operand before.
ffi::Error Empty(ffi::AnyBuffer, ffi::Result<ffi::AnyBuffer>) { return ffi::Error::Success(); }

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
#define BOOK                                                               \
  .Attr<int64_t>("power").Attr<int64_t>("count").Attr<bool>("has_negative") \
      .Attr<Lengths>("blocks")
HANDLER(jaxquant_encode_powers, EncodePowers,
        BOOK ARG(F32) ARG(S32) ARG(U32).Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
            .Ret<ffi::AnyBuffer>() RET(F32));
HANDLER(jaxquant_decode_powers, DecodePowers,
        BOOK.Arg<ffi::AnyBuffer>() ARG(F32) ARG(S32).Arg<ffi::AnyBuffer>() RET(F32));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_empty, Empty,
                              ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
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
