// A bug in a model is named by op, layer and shapes.
#include <functional>
#include <initializer_list>
#include <string>

#include <gtest/gtest.h>

#include "kernels/error.h"
#include "src/ops/attention.h"
#include "src/ops/linear.h"
#include "src/ops/loss.h"
#include "src/ops/mlp.h"
#include "src/ops/norm.h"
#include "src/ops/routing.h"

namespace fathom {
namespace {

class OpErrors : public ::testing::Test {
 protected:
  Tensor real(const Shape& shape) { return c_.zeros(shape, DType::F32); }
  Tensor ints(std::int64_t n) { return c_.zeros({n}, DType::I32); }

  /// The error has "[op] layer 3" and every one of `words`.
  void expect(const std::string& op, std::initializer_list<std::string> words,
              const std::function<void()>& call) {
    const LayerScope scope(c_, "layer 3");
    try {
      call();
      ADD_FAILURE() << op << ": no error";
    } catch (const InternalError& e) {
      const std::string text = e.what();
      EXPECT_NE(text.find("[" + op + "] layer 3"), std::string::npos) << text;
      for (const std::string& word : words) {
        EXPECT_NE(text.find(word), std::string::npos) << text << " lacks " << word;
      }
    }
  }

  Context c_{make_cpu_backend({}, 1), DType::F32};
};

TEST_F(OpErrors, NameOpLayerArgumentAndShapes) {
  expect("linear", {"x", "[8, 16]", "12"}, [&] { ops::linear(c_, real({8, 16}), real({5, 12})); });
  expect("linear", {"x", "[16]"}, [&] { ops::linear(c_, real({16}), real({5, 16})); });
  expect("add", {"b", "[2, 3]", "[3, 2]"}, [&] { ops::add(c_, real({3, 2}), real({2, 3})); });
  expect("bias_silu", {"x", "[2, 3]", "4"}, [&] { ops::bias_silu(c_, real({2, 3}), real({4})); });
  expect("row_score", {"x", "[2, 3]", "4"}, [&] { ops::row_score(c_, real({2, 3}), real({1, 4})); });
  expect("row_score", {"bias", "[2]", "[1]"}, [&] {
    ops::row_score(c_, real({2, 3}), real({1, 3}), real({2}));
  });
  expect("rms_norm", {"x", "[2, 3]", "4"}, [&] { ops::rms_norm(c_, real({2, 3}), real({4}), 1e-5); });
  expect("add_rms_norm", {"a", "[3, 3]", "[2, 3]"}, [&] {
    ops::add_rms_norm(c_, real({2, 3}), real({3, 3}), real({3}), 1e-5);
  });
  expect("rope", {"qkv", "[2, 10]"}, [&] { ops::rope(c_, real({2, 10}), ints(2), {}, {}, {2, 1}); });
  expect("rope", {"positions", "[3]", "[2]"}, [&] { ops::rope(c_, real({2, 16}), ints(3), {}, {}, {2, 1}); });
  expect("rope", {"q_norm", "[3]", "[4]"}, [&] {
    ops::rope(c_, real({2, 16}), ints(2), real({3}), real({4}), {2, 1});
  });
  expect("rope", {"k_norm", "undefined", "[4]"}, [&] {
    ops::rope(c_, real({2, 16}), ints(2), real({4}), {}, {2, 1});
  });
  expect("attention", {"qkv", "[5, 16]", "6"}, [&] {
    ops::attention(c_, real({5, 16}), {}, {.batch = 2, .seq = 3, .heads = 2, .kv_heads = 1});
  });
  expect("attention", {"first_key", "[3]", "[6]"}, [&] {
    ops::attention(c_, real({6, 16}), ints(3), {.batch = 2, .seq = 3, .heads = 2, .kv_heads = 1});
  });
  expect("swiglu", {"gate_up", "[2, 5]"}, [&] { ops::swiglu(c_, real({2, 5})); });
  expect("swiglu", {"gate_up", "[6]"}, [&] { ops::swiglu(c_, real({6})); });
  expect("embedding", {"table", "[6]"}, [&] { ops::embedding(c_, real({6}), ints(2)); });
  expect("top_k_rows", {"scores", "[5]", "[6]"}, [&] { ops::top_k_rows(c_, real({5}), 2, 3, 1); });
  expect("rows_above", {"scores", "[5]", "[6]"}, [&] { ops::rows_above(c_, real({5}), 0.0, 2, 3); });
  expect("gather_rows", {"x", "[6]"}, [&] { ops::gather_rows(c_, real({6}), ints(2)); });
  expect("gated_scatter", {"f", "[2, 4]", "[3, 4]"}, [&] {
    ops::gated_scatter(c_, real({6, 4}), real({2, 4}), real({6}), ints(3), GateKind::Raw);
  });
  expect("gated_scatter", {"r", "[3]", "[6]"}, [&] {
    ops::gated_scatter(c_, real({6, 4}), real({3, 4}), real({3}), ints(3), GateKind::Raw);
  });
  expect("gated_scatter", {"x", "[6]"}, [&] {
    ops::gated_scatter(c_, real({6}), real({3, 4}), real({6}), ints(3), GateKind::Raw);
  });
  expect("linear_cross_entropy", {"x", "[2, 3]", "4"}, [&] {
    ops::linear_cross_entropy(c_, real({2, 3}), real({5, 4}), ints(2), {});
  });
  expect("linear_cross_entropy", {"targets", "[3]", "[2]"}, [&] {
    ops::linear_cross_entropy(c_, real({2, 4}), real({5, 4}), ints(3), {});
  });
}

// Outside the blocks there is no layer to name.
TEST_F(OpErrors, WithoutALayer) {
  try {
    ops::linear(c_, real({8, 16}), real({5, 12}));
    FAIL() << "no error";
  } catch (const InternalError& e) {
    EXPECT_EQ(std::string(e.what()), "[linear] x is [8, 16], expected [-1, 12]");
  }
}

}  // namespace
}  // namespace fathom
