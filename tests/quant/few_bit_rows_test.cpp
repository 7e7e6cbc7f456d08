// What products do with their rows first: Hadamard transforms, whose inverses the weights have, and codes of
// few bits.
#include <cmath>
#include <map>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "infer/quant/activations.h"
#include "infer/quant/quantize_model.h"
#include "infer/quant/rotate.h"
#include "kernels/error.h"
#include "kernels/hadamard.h"
#include "src/ops/linear.h"
#include "src/ops/mlp.h"
#include "src/ops/norm_linear.h"
#include "tests/composed_codes.h"
#include "tests/forwarding_backend.h"
#include "tests/quant/model_kinds.h"
#include "tests/quant/round_to_nearest.h"

namespace fathom::model_test {
namespace {

using quant_test::round_to_nearest;

/// Weights of few bits, and the numbers that they stand for.
struct FewBits {
  PackedTensor packed;
  std::vector<float> numbers;
};

FewBits few_bits(Context& c, const std::vector<float>& w, const Shape& shape, int bits) {
  const std::int64_t in = shape[-1], rows = shape.size() / in;
  const PackedFormat f{bits, in, in};
  const QuantizedMatrix q = round_to_nearest({"w", 0, w, rows, f});
  std::vector<std::byte> codes;
  std::vector<std::uint8_t> row(static_cast<std::size_t>(f.code_bytes()));
  for (std::int64_t r = 0; r < rows; ++r) {
    pack_codes(row,
               std::span(q.codes).subspan(static_cast<std::size_t>(r * in), static_cast<std::size_t>(in)), f);
    const auto bytes = std::as_bytes(std::span(row));
    codes.insert(codes.end(), bytes.begin(), bytes.end());
  }
  FewBits made{upload_packed(c, shape, f, codes, q.scales), {}};
  made.numbers = dequantized(c.backend(), made.packed);
  return made;
}

std::vector<float> normal_numbers(std::int64_t n, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution;
  std::vector<float> v(static_cast<std::size_t>(n));
  for (float& x : v) x = distribution(generator);
  return v;
}

class RowsOfFewBits : public OnDevice<Device> {
 protected:
  RowsOfFewBits() : c_(testing_support::open_device(GetParam()).backend, DType::F32) {}
  Tensor tensor(const std::vector<float>& values, const Shape& shape) {
    const Tensor t = c_.empty(shape);
    from_host(c_.backend(), t, values);
    return t;
  }
  static std::vector<float> normal(std::int64_t n, unsigned seed) { return normal_numbers(n, seed); }
  Context c_;
};

// y = base + W (scale * codes of H x), experts' products too, by hand in double.
TEST_P(RowsOfFewBits, AreTransformedAndBecomeCodesBeforeTheProduct) {
  for (const int bits : {4, 8}) {
    for (const int activations : {4, 8, 16}) {
      for (const std::int64_t in : {12, 24, 40, 64, 18}) {
        for (const std::int64_t experts : {1, 3}) {
          SCOPED_TRACE(fmt::format("bits {} and {} in {} experts {}", bits, activations, in, experts));
          const std::int64_t rows = 7, out = 9, all = experts * rows;
          const std::vector<float> x = normal(all * in, 1), base = normal(all * out, 2);
          const Shape shape = experts > 1 ? Shape{experts, out, in} : Shape{out, in};
          const FewBits w = few_bits(c_, normal(shape.size(), 3), shape, bits);
          const ActivationFormat format{activations, 0.9};
          std::vector<double> seen;
          const ops::Weight weight =
              ops::Weight(w.packed)
                  .of({ops::Hadamard(c_, in), activations, static_cast<float>(format.clip)})
                  .shown_to([&](ConstView v, const LinearShape& s) {
                    EXPECT_EQ(s.x_stride, 0);
                    const Tensor copy = c_.empty({v.size});
                    c_.backend().copy(copy, v);
                    seen = to_doubles(c_.backend(), copy);
                  });
          const std::vector<float> y = to_floats(
              c_.backend(), ops::linear_add(c_, tensor(base, {all, out}), tensor(x, {all, in}), weight));
          const HadamardTransform transform(in);
          for (std::int64_t r = 0; r < all; ++r) {
            std::vector<double> row(x.begin() + r * in, x.begin() + (r + 1) * in);
            transform.apply(row);
            for (std::int64_t i = 0; i < in; ++i)
              EXPECT_NEAR(seen[static_cast<std::size_t>(r * in + i)], row[static_cast<std::size_t>(i)], 1e-5);
            // From what the op made of it: a code may lie on the other side of a tie.
            std::vector<float> turned(seen.begin() + r * in, seen.begin() + (r + 1) * in), held = turned;
            if (activations < 16) {
              std::vector<std::int8_t> codes(turned.size());
              decode_symmetric(codes, encode_symmetric(turned, format, codes), held);
            }
            for (std::int64_t o = 0; o < out; ++o) {
              double sum = base[static_cast<std::size_t>(r * out + o)];
              const std::int64_t of = (r / rows * out + o) * in;
              for (std::int64_t i = 0; i < in; ++i)
                sum += static_cast<double>(held[static_cast<std::size_t>(i)]) *
                       w.numbers[static_cast<std::size_t>(of + i)];
              ASSERT_NEAR(y[static_cast<std::size_t>(r * out + o)], sum, 2e-5) << r << " " << o;
            }
          }
        }
      }
    }
  }
}

// The rows of a SwiGLU lie in wider ones, as heads that are transformed do.
TEST_P(RowsOfFewBits, AreReadWhereTheyLie) {
  const std::int64_t rows = 5, hidden = 24, out = 6;
  const Tensor gate_up = tensor(normal(rows * 2 * hidden, 1), {rows, 2 * hidden});
  const FewBits w = few_bits(c_, normal(out * hidden, 3), {out, hidden}, 8);
  const ops::Weight weight = ops::Weight(w.packed).of({ops::Hadamard(c_, hidden), 8, 1.0F});
  const std::vector<double> inside = to_doubles(c_.backend(), ops::swiglu_linear(c_, gate_up, weight));
  const std::vector<double> apart =
      to_doubles(c_.backend(), ops::linear(c_, ops::swiglu(c_, gate_up), weight));
  EXPECT_LT(relative_difference(inside, apart), 1e-6);

  const std::vector<float> qkv = normal(rows * 40, 4);
  Tensor shared = tensor(qkv, {rows, 40});
  const Tensor kept = shared;
  const std::vector<float> turned =
      to_floats(c_.backend(), ops::hadamard_heads(c_, shared, 3, ops::Hadamard(c_, 8)));
  EXPECT_EQ(to_floats(c_.backend(), kept), qkv);  // others held it
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t i = 24; i < 40; ++i)
      EXPECT_EQ(turned[static_cast<std::size_t>(r * 40 + i)], qkv[static_cast<std::size_t>(r * 40 + i)]);
    for (std::int64_t head = 0; head < 3; ++head) {
      std::vector<double> row(qkv.begin() + r * 40 + head * 8, qkv.begin() + r * 40 + head * 8 + 8);
      HadamardTransform(8).apply(row);
      for (std::int64_t i = 0; i < 8; ++i)
        EXPECT_NEAR(turned[static_cast<std::size_t>(r * 40 + head * 8 + i)], row[static_cast<std::size_t>(i)],
                    1e-5);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, RowsOfFewBits, ::testing::ValuesIn(testing_support::devices()),
                         device_name);

/// Makes codes in one pass, by its ops, and remembers of what.
class MakesCodes final : public testing_support::ForwardingBackend {
 public:
  using ForwardingBackend::ForwardingBackend;
  bool make_codes(View codes, View scales, const CodeSource& from, const RowQuantization& s) override {
    made.push_back(fmt::format("{}{}{}{}", from.swiglu ? "swiglu " : "", from.norm ? "norm " : "",
                               from.addend ? "sum " : "", from.has_hadamard() ? "hadamard" : ""));
    if (refuses) return false;
    testing_support::compose_codes(*this, codes, scales, from, s);
    return true;
  }
  bool refuses = false;
  std::vector<std::string> made;
};

// Whether the backend makes a product's codes in one pass is not seen in what the product makes of them.
TEST(RowsOfFewBitsOf, OpsMayBecomeCodesInThePassThatMakesThem) {
  const auto backend = std::make_shared<MakesCodes>(make_cpu_backend({}, 2));
  Context c(backend, DType::F32);
  const std::int64_t rows = 6, in = 24, out = 10, experts = 2;
  const auto tensor = [&](std::int64_t n, std::int64_t width, unsigned seed) {
    const Tensor t = c.empty({n, width});
    from_host(c.backend(), t, normal_numbers(n * width, seed));
    return t;
  };
  const Tensor x = tensor(rows, in, 1), gate_up = tensor(rows, 2 * in, 2), base = tensor(rows, out, 3),
               addend = tensor(rows, in, 4);
  const Tensor norm = c.empty_stat({in});
  from_host(c.backend(), norm, normal_numbers(in, 5));
  for (const int bits : {4, 8}) {
    const FewBits one = few_bits(c, normal_numbers(out * in, 6), {out, in}, 4);
    const FewBits many = few_bits(c, normal_numbers(experts * out * in, 7), {experts, out, in}, 4);
    const ops::Weight plain = ops::Weight(one.packed).of({{}, bits, 0.9F});
    const ops::InputTransform turned{ops::Hadamard(c, 12, 2), bits, 0.9F};
    const ops::Weight w = ops::Weight(one.packed).of(turned),
                      of_experts = ops::Weight(many.packed).of(turned);
    const auto all = [&] {
      const auto [sum, product] = ops::add_rms_norm_linear(c, x, addend, norm, plain, 1e-5);
      std::vector<float> results;
      for (const Tensor& y :
           {ops::rms_norm_linear(c, x, norm, plain, 1e-5), sum, product, ops::linear_add(c, base, x, w),
            ops::linear(c, x, of_experts), ops::swiglu_linear(c, gate_up, plain),
            ops::swiglu_linear_add(c, base, gate_up, w), ops::swiglu_linear(c, gate_up, of_experts)}) {
        const std::vector<float> values = to_floats(c.backend(), y);
        results.insert(results.end(), values.begin(), values.end());
      }
      return results;
    };
    backend->made.clear();
    backend->refuses = false;
    const std::vector<float> in_one = all();
    EXPECT_EQ(backend->made, (std::vector<std::string>{"norm sum ", "norm ", "hadamard", "hadamard",
                                                       "swiglu ", "swiglu hadamard", "swiglu hadamard"}));
    backend->refuses = true;
    // Of a SwiGLU whose pass is refused the transform is asked for alone.
    EXPECT_EQ(all(), in_one);
    backend->refuses = false;
    backend->made.clear();
    int seen = 0;
    const auto look = [&](ConstView, const LinearShape&) { ++seen; };
    ops::swiglu_linear(c, gate_up, w.shown_to(look));
    ops::rms_norm_linear(c, x, norm, plain.shown_to(look), 1e-5);
    ops::linear(c, x, w.shown_to(look));
    EXPECT_EQ(seen, 3);
    EXPECT_TRUE(backend->made.empty());  // who looks sees rows
  }
}

TEST(RowsOfFewBitsOf, NumbersAndTapesAreRefused) {
  Context c(make_cpu_backend({}, 2), DType::F32);
  const Tensor x = c.zeros({2, 8}, DType::F32), w = c.zeros({3, 8}, DType::F32);
  EXPECT_THROW(ops::linear(c, x, ops::Weight(w).of({{}, 8, 1.0F})), InternalError);
  Tape tape(c);
  const Recording recording(c, tape);
  EXPECT_THROW(ops::linear(c, x, ops::Weight(w).of({ops::Hadamard(c, 8), 16, 1.0F})), InternalError);
  EXPECT_THROW(ops::hadamard_heads(c, x, 1, ops::Hadamard(c, 8)), InternalError);
}

class ModelOfFewBitRows : public ::testing::TestWithParam<ModelKind> {};

// GPTQ's Hessians are of what the weights then multiply.
TEST_P(ModelOfFewBitRows, ShowsWhatItsProductsReadBehindTheTransforms) {
  SmallModel m(DType::F32, small_config(), GetParam().routing);
  const Batch batch = m.random_batch(2, 16, 5);
  const NoGrad no_grad(m.context);
  const auto inputs = [&](const OnlineHadamards& online) {
    std::map<std::pair<std::string, std::int64_t>, std::vector<float>> seen;
    const auto rotated = rotate_model(m.context, m.model, {.seed = 3, .online = online});
    Tensor stream = rotated->embed(m.context, batch);
    ForwardResult decided;
    for (std::int64_t layer = 0; layer < 2; ++layer) {
      stream = rotated->run_block(m.context, layer, stream, batch, GetParam().rule, decided,
                                  [&](const ProductInput& in) {
                                    seen[{in.parameter, in.expert}] = in.x;
                                  });
    }
    return seen;
  };
  const auto plain = inputs({}), online = inputs({.down = true, .heads = true, .queries_keys = true});
  ASSERT_EQ(plain.size(), online.size());
  const HadamardTransform hidden(small_config().ffn_hidden), heads(small_config().heads);
  for (const auto& [name, x] : plain) {
    std::vector<double> expected(x.begin(), x.end());
    if (name.first.ends_with("down_proj.weight")) {
      for (std::size_t i = 0; i < x.size(); i += 20) hidden.apply(std::span(expected).subspan(i, 20));
    }
    if (name.first.ends_with("o_proj.weight")) {
      for (std::size_t i = 0; i < x.size(); ++i) {
        if (i % 16 >= 4) continue;  // four heads of four elements
        std::vector<double> element;
        for (std::size_t h = 0; h < 4; ++h) element.push_back(x[i + 4 * h]);
        heads.apply(element);
        for (std::size_t h = 0; h < 4; ++h) expected[i + 4 * h] = element[h];
      }
    }
    const std::vector<float>& seen = online.at(name);
    EXPECT_LT(relative_difference({seen.begin(), seen.end()}, expected), 1e-4) << name.first;
  }
}

// Every kind of model, from 16 bits to 8 and 4: less and less exact, and each product reads rows of few bits.
TEST_P(ModelOfFewBitRows, LosesMoreWithFewerBits) {
  SmallModel m(DType::F32, small_config(), GetParam().routing);
  const NoGrad no_grad(m.context);
  const Batch batch = m.random_batch(4, 24, 5);
  const OnlineHadamards online{.down = true, .heads = true};
  const auto rotated = rotate_model(m.context, m.model, {.seed = 3, .online = online});
  const auto logits = [&](const Transformer& t) {
    return to_doubles(m.context.backend(),
                      t.logits(m.context, t.forward(m.context, batch, GetParam().rule).hidden));
  };
  const std::vector<double> exact = logits(*rotated);
  // Over the logits' own size: decisions may flip, and then a row is another one.
  const auto lost = [&](int activations) {
    const Quantization q{.bits = 8,
                         .activations = activations,
                         .activation_clip = default_activation_clip(activations),
                         .online = online};
    const std::vector<double> ours = logits(*quantize_model(m.context, *rotated, q, round_to_nearest).model);
    double errors = 0, squares = 0;
    for (std::size_t i = 0; i < exact.size(); ++i) {
      errors += (ours[i] - exact[i]) * (ours[i] - exact[i]);
      squares += exact[i] * exact[i];
    }
    return std::sqrt(errors / squares);
  };
  const double sixteen = lost(16), eight = lost(8), four = lost(4);
  EXPECT_NE(eight, sixteen);
  EXPECT_GT(four, eight);
  EXPECT_LT(eight, 0.3);
  EXPECT_GT(four, 0.02);
  EXPECT_LT(four, 1.2);
}

INSTANTIATE_TEST_SUITE_P(Models, ModelOfFewBitRows, ::testing::ValuesIn(model_kinds()),
                         [](const auto& of_case) { return of_case.param.name; });

}  // namespace
}  // namespace fathom::model_test
