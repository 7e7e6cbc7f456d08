// What the tape promises to ops and models, whatever the op.

#include <gtest/gtest.h>

#include "kernels/error.h"
#include "src/autograd/recompute.h"
#include "src/ops/attention.h"
#include "src/ops/linear.h"
#include "src/ops/loss.h"
#include "src/ops/mlp.h"
#include "src/ops/norm.h"
#include "src/ops/routing.h"

namespace fathom {
namespace {

using Values = std::vector<double>;

class TapeTest : public ::testing::Test {
 protected:
  explicit TapeTest(DType dtype = DType::F64) : c_(make_cpu_backend({}, 1), dtype) {}

  Tensor leaf(const Shape& shape, const Values& values) {
    Tensor t = c_.empty(shape);
    from_doubles(c_.backend(), t, values);
    t.set_requires_grad(true);
    return t;
  }
  Tensor ramp(const Shape& shape, double from, double step = 0.25) {
    Values values;
    for (std::int64_t i = 0; i < shape.size(); ++i)
      values.push_back(from + step * static_cast<double>(i % 7));
    return leaf(shape, values);
  }
  Tensor constant(const Shape& shape, double value) {
    Tensor t = c_.empty(shape);
    c_.backend().fill(t, value);
    return t;
  }
  Values host(const Tensor& t) { return to_doubles(c_.backend(), t); }

  Context c_;
};

// Runs with a tape for as long as it lives.
struct Recording {
  explicit Recording(Context& c) : context(c), tape(c) { c.set_tape(&tape); }
  ~Recording() { context.set_tape(nullptr); }
  void backward() {
    context.set_tape(nullptr);
    tape.backward();
  }
  Context& context;
  Tape tape;
};

TEST_F(TapeTest, TensorUsedTwiceGetsTheSum) {
  const Tensor x = leaf({1, 2}, {1, 2});
  Recording r(c_);
  const Tensor y = ops::add(c_, ops::add(c_, x, x), x);
  r.tape.seed(y, constant({1, 2}, 2.0));
  r.backward();
  EXPECT_EQ(host(r.tape.collected(x)), (Values{6, 6}));
}

// Whoever waits for a layer's gradients is told once, when all of them are there; also of a layer that nobody
// asked anything of.
TEST_F(TapeTest, BackwardTellsOfEachLayerThatIsThrough) {
  const Tensor x = leaf({1, 2}, {1, 2});
  std::vector<std::string> told;
  Values at_layer_1;
  {
    Recording r(c_);
    Tensor y = ops::add(c_, x, x);
    for (const char* name : {"layer 0", "layer 1"}) {
      const LayerScope layer(c_, name);
      y = ops::add(c_, ops::add(c_, y, x), x);
    }
    {
      const LayerScope layer(c_, "layer 2");
      ops::add(c_, x, x);  // unused
    }
    y = ops::add(c_, y, x);
    r.tape.seed(y, constant({1, 2}, 1.0));
    c_.set_tape(nullptr);
    r.tape.backward([&](const std::string& layer) {
      told.push_back(layer);
      if (layer == "layer 1") at_layer_1 = host(r.tape.collected(x));
    });
  }
  EXPECT_EQ(told, (std::vector<std::string>{"", "layer 2", "layer 1", "layer 0", ""}));
  EXPECT_EQ(at_layer_1, (Values{3, 3}));
}

// add gives one gradient, and so one storage, to both inputs: what reaches one later must not reach the
// other.
TEST_F(TapeTest, SharedGradientIsNotCorruptedByAccumulation) {
  const Tensor x = leaf({1, 2}, {1, 2}), z = leaf({1, 2}, {3, 4});
  Recording r(c_);
  const Tensor early = ops::add(c_, x, x);  // its backward runs last and adds to x
  const Tensor y = ops::add(c_, x, z);
  r.tape.seed(y, constant({1, 2}, 1.0));
  r.tape.seed(early, constant({1, 2}, 10.0));
  r.backward();
  EXPECT_EQ(host(r.tape.collected(x)), (Values{21, 21}));
  EXPECT_EQ(host(r.tape.collected(z)), (Values{1, 1}));
}

// The same for backwards that add into a sum (gather_rows, row_score) instead of giving a tensor.
TEST_F(TapeTest, SharedGradientIsNotCorruptedBySumInto) {
  const Tensor x = leaf({2, 2}, {1, 2, 3, 4}), z = leaf({2, 2}, {0, 0, 0, 0});
  const Tensor w = leaf({1, 2}, {5, 7});
  Recording r(c_);
  const Tensor score = ops::row_score(c_, x, w);
  const Tensor y = ops::add(c_, x, z);
  r.tape.seed(y, constant({2, 2}, 1.0));
  r.tape.seed(score, constant({2}, 1.0));
  r.backward();
  EXPECT_EQ(host(r.tape.collected(x)), (Values{6, 8, 6, 8}));
  EXPECT_EQ(host(r.tape.collected(z)), (Values{1, 1, 1, 1}));
}

// RoPE without QK-norm may rotate its gradient in place, but only where nobody else holds it.
TEST_F(TapeTest, SharedGradientIsNotCorruptedByAnInPlaceBackward) {
  const Tensor x = leaf({1, 6}, {1, 2, 3, 4, 5, 6}), z = leaf({1, 6}, {0, 0, 0, 0, 0, 0});
  const Tensor position = c_.empty({1}, DType::I32);
  from_host<std::int32_t>(c_.backend(), position, {3});
  const Values dy = {1, 2, 3, 4, 5, 6};
  const Tensor seed = c_.empty({1, 6});
  from_doubles(c_.backend(), seed, dy);
  Recording r(c_);
  const Tensor y = ops::add(c_, ops::rope(c_, x, position, {}, {}, {.heads = 1, .kv_heads = 1}), z);
  r.tape.seed(y, seed);
  r.backward();
  EXPECT_EQ(host(r.tape.collected(z)), dy);
  EXPECT_EQ(host(seed), dy);
  EXPECT_NE(host(r.tape.collected(x)), dy);
}

TEST_F(TapeTest, UnusedOutputsCostNothing) {
  const Tensor x = leaf({1, 2}, {1, 2}), w = leaf({3, 2}, {1, 0, 0, 1, 1, 1});
  Recording r(c_);
  const Tensor used = ops::add(c_, x, x);
  const Tensor unused =
      ops::linear(c_, used, w);  // recorded after `used`, so that its backward would run first
  EXPECT_EQ(r.tape.size(), 2U);
  r.tape.seed(used, constant({1, 2}, 1.0));
  c_.backend().flop_log.enabled = true;
  c_.backend().flop_log.clear();
  r.backward();
  EXPECT_EQ(c_.backend().flop_log.total(), 0);
  EXPECT_EQ(host(r.tape.collected(x)), (Values{2, 2}));
  EXPECT_FALSE(r.tape.collected(w).defined());
  EXPECT_EQ(r.tape.size(), 0U);
}

TEST_F(TapeTest, NoGradRecordsNothing) {
  const Tensor x = leaf({1, 2}, {1, 2});
  Recording r(c_);
  {
    const NoGrad no_grad(c_);
    const Tensor y = ops::add(c_, x, x);
    EXPECT_FALSE(y.requires_grad());
    EXPECT_EQ(c_.tape(), nullptr);
  }
  EXPECT_EQ(r.tape.size(), 0U);
  EXPECT_EQ(c_.tape(), &r.tape);
  ops::add(c_, constant({1, 2}, 1.0), constant({1, 2}, 2.0));  // nothing wants a gradient
  EXPECT_EQ(r.tape.size(), 0U);
}

TEST_F(TapeTest, BackwardIsNotRecorded) {
  const Tensor x = leaf({1, 2}, {1, 2});
  Recording r(c_);
  const Tensor y = ops::add(c_, x, x);
  r.tape.seed(y, constant({1, 2}, 1.0));
  r.tape.backward();  // the tape is still the context's
  EXPECT_EQ(r.tape.size(), 0U);
  EXPECT_EQ(host(r.tape.collected(x)), (Values{2, 2}));
}

// One chain of most ops; on the way back, everything saved goes.
TEST_F(TapeTest, BackwardReleasesWhatWasSaved) {
  const Tensor table = ramp({5, 8}, -1), w = ramp({8, 8}, -0.5), qkv_w = ramp({24, 8}, -0.6),
               up = ramp({8, 8}, 0.1), down = ramp({8, 4}, 0.2), norm = ramp({8}, 1),
               router = ramp({1, 8}, 0.3);
  const Tensor tokens = c_.zeros({6}, DType::I32), positions = c_.zeros({6}, DType::I32);
  const Tensor kept = c_.empty({3}, DType::I32);
  from_host<std::int32_t>(c_.backend(), kept, {0, 2, 5});
  for (Tensor t : {table, w, qkv_w, up, down, norm, router}) t.bind_gradient(c_.zeros(t.shape(), DType::F64));
  const auto in_use = [&] { return c_.allocator().use().total_now; };
  const std::size_t before = in_use();
  std::size_t recorded = 0;
  for (int again = 0; again < 2; ++again) {
    Recording r(c_);
    {
      const Tensor x = ops::embedding(c_, table, tokens);
      const Tensor score = ops::row_score(c_, x, router);
      const Tensor in = ops::gather_rows(c_, x, kept);
      Tensor qkv = ops::linear(c_, ops::rms_norm(c_, in, norm, 1e-5), qkv_w);
      qkv = ops::rope(c_, qkv, ops::gather_int32(c_, positions, kept), {}, {}, {.heads = 2, .kv_heads = 2});
      const Tensor a = ops::linear(c_, ops::attention(c_, qkv, {}, {1, 3, 2, 2}), w);
      const auto [h, normed] = ops::add_rms_norm(c_, in, a, norm, 1e-5);
      const Tensor m = ops::linear(c_, ops::swiglu(c_, ops::linear(c_, normed, up)), down);
      const Tensor y = ops::gated_scatter(c_, x, ops::add(c_, a, m), score, kept, GateKind::Tanh);
      ops::linear_cross_entropy(c_, y, table, tokens, {});
      ops::membership_bce(c_, score, kept, {});
    }
    EXPECT_GT(in_use(), before);
    if (again == 0) recorded = in_use();
    EXPECT_EQ(in_use(), recorded);
    r.backward();
    EXPECT_EQ(in_use(), before) << "still on the tape after its backward";
  }
  EXPECT_EQ(in_use(), before);
}

TEST_F(TapeTest, ClearReleasesEverything) {
  const Tensor x = ramp({4, 4}, 1);
  const std::size_t before = c_.allocator().use().total_now;
  Recording r(c_);
  r.tape.seed(ops::add(c_, x, x), constant({4, 4}, 1.0));
  EXPECT_GT(c_.allocator().use().total_now, before);
  r.tape.clear();
  EXPECT_EQ(c_.allocator().use().total_now, before);
  EXPECT_EQ(r.tape.size(), 0U);
}

TEST_F(TapeTest, BoundGradientsAddUpOverTapes) {
  Tensor w = leaf({1, 2}, {3, 4});
  const Tensor arena = c_.zeros({1, 2}, DType::F64);
  w.bind_gradient(arena);
  const Tensor x = leaf({2, 2}, {1, 2, 10, 20});
  for (int tape = 1; tape <= 2; ++tape) {
    Recording r(c_);
    const Tensor y = ops::linear(c_, x, w);
    r.tape.seed(y, constant({2, 1}, 1.0));
    r.backward();
    EXPECT_EQ(host(arena), (Values{11.0 * tape, 22.0 * tape}));
    EXPECT_FALSE(r.tape.collected(w).defined());
  }
}

TEST_F(TapeTest, GradientOfAnotherShapeIsRefused) {
  const Tensor x = leaf({1, 2}, {1, 2});
  Tape tape(c_);
  try {
    tape.seed(x, constant({2, 1}, 1.0));
    FAIL() << "no error";
  } catch (const InternalError& e) {
    EXPECT_NE(std::string(e.what()).find("[2, 1]"), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("[1, 2]"), std::string::npos) << e.what();
  }
}

// --- recomputation ---

class RecomputeTest : public TapeTest {
 protected:
  RecomputeTest() : TapeTest(DType::F32) {}

  // Two inputs, two outputs, and a weight that it captures.
  static BlockFunction block(const Tensor& w, const Tensor& norm) {
    return [w, norm](Context& c, const std::vector<Tensor>& in) -> std::vector<Tensor> {
      const auto [h, y] = ops::add_rms_norm(c, in[0], in[1], norm, 1e-5);
      return {h, ops::swiglu(c, ops::linear(c, y, w))};
    };
  }

  struct Result {
    Values outputs[2], dx, da, dw, dnorm;
    bool operator==(const Result&) const = default;
  };
  enum class How { Direct, Recomputed };
  Result run(How how, const std::vector<std::size_t>& used) {
    const Tensor x = ramp({5, 8}, -0.9, 0.31), a = ramp({5, 8}, 0.4, -0.17);
    Tensor w = ramp({16, 8}, -0.7, 0.23), norm = ramp({8}, 0.6, 0.1);
    for (Tensor* t : {&w, &norm}) t->bind_gradient(c_.zeros(t->shape(), DType::F32));
    Recording r(c_);
    const Tensor sum = ops::add(c_, x, a);  // so that the inputs are not leaves of the tape
    const BlockFunction f = block(w, norm);
    std::vector<Tensor> out = how == How::Direct ? f(c_, {sum, a}) : recompute(c_, f, {sum, a});
    Result result;
    for (std::size_t i = 0; i < 2; ++i) result.outputs[i] = host(out[i]);
    for (std::size_t i : used) r.tape.seed(out[i], ramp(out[i].shape(), 1.0, -0.3));
    r.backward();
    const auto collected = [&](const Tensor& t) {
      const Tensor g = r.tape.collected(t);
      return g.defined() ? host(g) : Values();
    };
    result.dx = collected(x);
    result.da = collected(a);
    result.dw = host(w.bound_gradient());
    result.dnorm = host(norm.bound_gradient());
    return result;
  }
};

TEST_F(RecomputeTest, EqualsDirectBitForBit) {
  for (const std::vector<std::size_t>& used : {std::vector<std::size_t>{0, 1}, {0}, {1}}) {
    const Result direct = run(How::Direct, used);
    EXPECT_TRUE(direct == run(How::Recomputed, used));
    EXPECT_FALSE(direct.dx.empty());
    EXPECT_NE(direct.dx, Values(direct.dx.size(), 0.0));
  }
}

TEST_F(RecomputeTest, KeepsItsInputsOnly) {
  const Tensor x = ramp({64, 8}, -0.9), a = ramp({64, 8}, 0.4), w = ramp({16, 8}, -0.7),
               norm = ramp({8}, 0.6);
  const auto recorded = [&](How how) {
    const std::size_t before = c_.allocator().use().total_now;
    Recording r(c_);
    const BlockFunction f = block(w, norm);
    std::vector<Tensor> out = how == How::Direct ? f(c_, {x, a}) : recompute(c_, f, {x, a});
    const std::size_t outputs = 2 * 64 * 8 * sizeof(float);
    return c_.allocator().use().total_now - before - outputs;
  };
  EXPECT_EQ(recorded(How::Recomputed), 0U);
  EXPECT_GT(recorded(How::Direct), 0U);
}

TEST_F(RecomputeTest, UndefinedInputsStayUndefined) {
  const Tensor x = leaf({1, 2}, {1, 2});
  Recording r(c_);
  const auto f = [](Context& c, const std::vector<Tensor>& in) -> std::vector<Tensor> {
    EXPECT_FALSE(in[1].defined());
    return {ops::add(c, in[0], in[0])};
  };
  const Tensor y = recompute(c_, f, {x, Tensor()})[0];
  r.tape.seed(y, constant({1, 2}, 1.0));
  r.backward();
  EXPECT_EQ(host(r.tape.collected(x)), (Values{2, 2}));
}

// --- finding a number that is not finite ---

class NonFiniteTest : public TapeTest {
 protected:
  NonFiniteTest() : TapeTest(DType::F32) { c_.trace_nonfinite(true); }
};

TEST_F(NonFiniteTest, ForwardNamesTheFirstOpAndItsLayer) {
  const Tensor x = leaf({1, 2}, {3e38, 1});
  ops::add(c_, constant({1, 2}, 1.0), constant({1, 2}, 1.0));
  EXPECT_EQ(c_.found_nonfinite(), nullptr);
  {
    const LayerScope scope(c_, "layer 3");
    ops::swiglu(c_, ops::add(c_, x, x));  // the sum overflows, and then so does what reads it
  }
  ASSERT_NE(c_.found_nonfinite(), nullptr);
  EXPECT_EQ(c_.found_nonfinite()->op, "add");
  EXPECT_EQ(c_.found_nonfinite()->layer, "layer 3");
  EXPECT_EQ(c_.found_nonfinite()->count, 1);
}

TEST_F(NonFiniteTest, BackwardNamesTheOpThatRan) {
  const Tensor x = leaf({1, 2}, {1e-30, 1e-30}), w = leaf({1, 2}, {1e25, 1});
  Recording r(c_);
  Tensor y;
  {
    const LayerScope scope(c_, "layer 2");
    y = ops::linear(c_, x, w);
  }
  {
    const LayerScope scope(c_, "layer 5");
    y = ops::add(c_, y, y);
  }
  r.tape.seed(y, constant({1, 1}, 1e20));
  EXPECT_EQ(c_.found_nonfinite(), nullptr);
  r.backward();
  ASSERT_NE(c_.found_nonfinite(), nullptr);
  EXPECT_EQ(c_.found_nonfinite()->op, "linear backward");
  EXPECT_EQ(c_.found_nonfinite()->layer, "layer 2");
  EXPECT_EQ(c_.found_nonfinite()->count, 1);
}

// Gradients of weights are added in place and never pass through give().
TEST_F(NonFiniteTest, BackwardNamesTheOpOfAWeightGradient) {
  const Tensor x = leaf({1, 2}, {1e25, 1}), w = leaf({1, 2}, {1e-30, 1e-30});
  Recording r(c_);
  Tensor y;
  {
    const LayerScope scope(c_, "layer 1");
    y = ops::linear(c_, x, w);
  }
  r.tape.seed(y, constant({1, 1}, 1e20));
  r.backward();
  ASSERT_NE(c_.found_nonfinite(), nullptr);
  EXPECT_EQ(c_.found_nonfinite()->op, "linear backward");
  EXPECT_EQ(c_.found_nonfinite()->layer, "layer 1");
}

// The head makes its gradients on the way forward.
TEST_F(NonFiniteTest, BackwardOfTheHead) {
  const Tensor x = leaf({1, 2}, {3e38, 0}), w = leaf({2, 2}, {1e-30, 0, 0, 1});
  const Tensor targets = c_.empty({1}, DType::I32);
  from_host<std::int32_t>(c_.backend(), targets, {1});
  Recording r(c_);
  ops::linear_cross_entropy(c_, x, w, targets, {.gradient_scale = 10});
  ASSERT_NE(c_.found_nonfinite(), nullptr);
  EXPECT_EQ(c_.found_nonfinite()->op, "head backward");
}

TEST_F(NonFiniteTest, OffFindsNothing) {
  c_.trace_nonfinite(false);
  const Tensor x = leaf({1, 2}, {3e38, 1});
  ops::add(c_, x, x);
  EXPECT_EQ(c_.found_nonfinite(), nullptr);
}

}  // namespace
}  // namespace fathom
