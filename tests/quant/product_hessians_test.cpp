// What products show of their inputs is what the model computes with, and Hessians are made of it.
#include "infer/quant/product_hessians.h"

#include <cmath>
#include <map>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "kernels/error.h"
#include "tests/quant/model_kinds.h"

namespace fathom::model_test {
namespace {

using Values = std::vector<double>;

class ShownInputs : public ::testing::TestWithParam<ModelKind> {
 protected:
  static constexpr std::int64_t kSequences = 3, kLength = 24;

  ShownInputs() : m(DType::F64, small_config(), GetParam().routing) {}

  // Runs block after block, all inputs by parameter and expert.
  void run() {
    const NoGrad no_grad(m.context);
    streams.push_back(m.model.embed(m.context, batch));
    const ProductObserver add = hessians.observer();
    for (std::int64_t layer = 0; layer < m.model.config().depth; ++layer) {
      streams.push_back(m.model.run_block(m.context, layer, streams.back(), batch, GetParam().rule, decided,
                                          [&](const ProductInput& input) {
                                            add(input);
                                            seen[input.parameter].push_back(input);
                                          }));
    }
  }
  Values weight(const std::string& name, std::int64_t expert) {
    const Tensor& w = m.model.parameters().get(name);
    Values all = m.host(w);
    if (w.shape().rank() < 3) return all;
    const auto each = static_cast<std::ptrdiff_t>(all.size()) / w.dim(0);
    return {all.begin() + expert * each, all.begin() + (expert + 1) * each};
  }
  // W x of one row.
  static Values product(const Values& w, const float* x, std::size_t columns) {
    Values y;
    for (std::size_t r = 0; r < w.size() / columns; ++r) {
      y.push_back(0);
      for (std::size_t k = 0; k < columns; ++k) y.back() += w[r * columns + k] * static_cast<double>(x[k]);
    }
    return y;
  }
  std::string at(std::int64_t layer, const char* kind) const {
    const bool of_experts = GetParam().routing.has_experts() && std::string(kind).find("mlp.") == 0;
    return fmt::format("model.layers.{}.{}{}", layer, of_experts ? "mlp.experts." : "",
                       of_experts ? std::string(kind).substr(4) : kind);
  }

  SmallModel m;
  Batch batch = m.random_batch(kSequences, kLength, 5);
  std::vector<Tensor> streams;
  ForwardResult decided;
  ProductHessians hessians;
  std::map<std::string, std::vector<ProductInput>> seen;
};

TEST_P(ShownInputs, MakeWhatTheBlockAddsToTheStream) {
  run();
  // Block after block is the whole pass.
  const ForwardResult whole = [&] {
    const NoGrad no_grad(m.context);
    return m.model.forward(m.context, batch, GetParam().rule, [&](std::int64_t blocks, const Tensor& stream) {
      EXPECT_LT(relative_difference(m.host(streams.at(static_cast<std::size_t>(blocks))), m.host(stream)),
                1e-14);
    });
  }();
  ASSERT_EQ(whole.routing.size(), decided.routing.size());
  ASSERT_EQ(whole.experts.size(), decided.experts.size());

  const auto width = static_cast<std::size_t>(m.model.config().width);
  for (std::int64_t layer = 0; layer < m.model.config().depth; ++layer) {
    SCOPED_TRACE(layer);
    const Values before = m.host(streams[static_cast<std::size_t>(layer)]),
                 after = m.host(streams[static_cast<std::size_t>(layer) + 1]);
    Values added(width), made(width);
    for (std::size_t i = 0; i < before.size(); ++i) added[i % width] += after[i] - before[i];
    for (const char* kind : {"self_attn.o_proj.weight", "mlp.down_proj.weight"}) {
      for (const ProductInput& input : seen[at(layer, kind)]) {
        const auto columns = static_cast<std::size_t>(input.columns);
        const Values w = weight(input.parameter, input.expert);
        const std::size_t rows = input.x.size() / columns;
        ASSERT_TRUE(input.gates.empty() || input.gates.size() == rows);
        for (std::size_t r = 0; r < rows; ++r) {
          const Values y = product(w, &input.x[r * columns], columns);
          for (std::size_t i = 0; i < width; ++i)
            made[i] += y[i] * (input.gates.empty() ? 1.0 : static_cast<double>(input.gates[r]));
        }
      }
    }
    EXPECT_LT(relative_difference(made, added), 1e-6);
    // What down reads is the SwiGLU of what gate and up give, expert by expert.
    const auto& gate_ups = seen[at(layer, "mlp.gate_up_proj.weight")];
    const auto& downs = seen[at(layer, "mlp.down_proj.weight")];
    ASSERT_EQ(gate_ups.size(), downs.size());
    for (std::size_t i = 0; i < downs.size(); ++i) {
      EXPECT_TRUE(gate_ups[i].gates.empty());
      ASSERT_EQ(gate_ups[i].expert, downs[i].expert);
      const auto hidden = static_cast<std::size_t>(downs[i].columns);
      const Values w = weight(gate_ups[i].parameter, gate_ups[i].expert);
      Values expected;
      for (std::size_t first = 0; first < gate_ups[i].x.size(); first += width) {
        const Values y = product(w, &gate_ups[i].x[first], width);
        for (std::size_t k = 0; k < hidden; ++k)
          expected.push_back(y[k] / (1 + std::exp(-y[k])) * y[hidden + k]);
      }
      EXPECT_LT(relative_difference(Values(downs[i].x.begin(), downs[i].x.end()), expected), 1e-5);
    }
  }
}

// qkv reads the norm of the stream, of kept rows alone; the Hessian of any product is the sum over its rows.
TEST_P(ShownInputs, MakeHessiansAsByHand) {
  run();
  const auto width = static_cast<std::size_t>(m.model.config().width);
  std::size_t routed_layers = 0;
  for (std::int64_t layer = 0; layer < m.model.config().depth; ++layer) {
    SCOPED_TRACE(layer);
    std::vector<std::int32_t> rows;
    if (GetParam().routing.routes(layer)) {
      rows = to_host<std::int32_t>(m.context.backend(), decided.routing.at(routed_layers++).indices);
      EXPECT_LT(std::ssize(rows), kSequences * kLength);
    } else {
      for (std::int32_t r = 0; r < kSequences * kLength; ++r) rows.push_back(r);
    }
    const Values stream = m.host(streams[static_cast<std::size_t>(layer)]),
                 norm = weight(at(layer, "input_layernorm.weight"), 0);
    Values sum(width * width);
    for (const std::int32_t row : rows) {
      Values x(stream.begin() + row * static_cast<std::ptrdiff_t>(width),
               stream.begin() + (row + 1) * static_cast<std::ptrdiff_t>(width));
      double squares = 0;
      for (const double v : x) squares += v * v;
      const double rstd = 1 / std::sqrt(squares / static_cast<double>(width) + m.model.config().norm_eps);
      for (std::size_t i = 0; i < width; ++i) x[i] *= rstd * norm[i];
      for (std::size_t i = 0; i < width * width; ++i) sum[i] += x[i / width] * x[i % width];
    }
    const std::string qkv = at(layer, "self_attn.qkv_proj.weight");
    ASSERT_EQ(hessians.tokens(qkv), std::ssize(rows));
    Values ours;
    for (std::size_t i = 0; i < width * width; ++i)
      ours.push_back(
          hessians.find(qkv)->at(static_cast<std::int64_t>(i / width), static_cast<std::int64_t>(i % width)));
    EXPECT_LT(relative_difference(ours, sum), 1e-6);
  }
  std::int64_t of_experts = 0;
  for (const auto& [parameter, inputs] : seen) {
    for (const ProductInput& input : inputs) {
      SCOPED_TRACE(fmt::format("{} {}", parameter, input.expert));
      const auto n = static_cast<std::size_t>(input.columns);
      Values sum(n * n), ours;
      for (std::size_t r = 0; r < input.x.size() / n; ++r) {
        const double g = input.gates.empty() ? 1.0 : static_cast<double>(input.gates[r]);
        for (std::size_t i = 0; i < n * n; ++i)
          sum[i] += g * g * static_cast<double>(input.x[r * n + i / n]) *
                    static_cast<double>(input.x[r * n + i % n]);
      }
      const Hessian* h = hessians.find(parameter, input.expert);
      ASSERT_NE(h, nullptr);
      EXPECT_EQ(h->tokens() * input.columns, std::ssize(input.x));
      for (std::size_t i = 0; i < n * n; ++i)
        ours.push_back(h->at(static_cast<std::int64_t>(i / n), static_cast<std::int64_t>(i % n)));
      EXPECT_LT(relative_difference(ours, sum), 1e-6);
      of_experts += parameter.find("experts.down") != std::string::npos ? h->tokens() : 0;
    }
  }
  // Experts' tokens are those that were dispatched, no empty slot among them.
  std::int64_t dispatched = 0;
  for (const ExpertLayer& e : decided.experts) {
    for (const std::int32_t row : to_host<std::int32_t>(m.context.backend(), e.dispatch.rows))
      dispatched += row >= 0 ? 1 : 0;
  }
  EXPECT_EQ(of_experts, dispatched);
  EXPECT_EQ(hessians.find("model.norm.weight"), nullptr);
  EXPECT_EQ(hessians.tokens("model.norm.weight"), 0);
}

using DeviceSums = OnDevice<Device>;

// What the device sums and what the host sums of the same rows; the former where rows need no host.
TEST_P(DeviceSums, AreTheHostsHessians) {
  for (const ModelKind& kind : model_kinds()) {
    for (const DType dtype : {DType::F32, GetParam() == Device::Cpu ? DType::F64 : DType::BF16}) {
      SCOPED_TRACE(fmt::format("{}, {}", kind.name, name_of(dtype)));
      SmallModel m(dtype, small_config(), kind.routing, {}, GetParam());
      const Batch batch = m.random_batch(3, 24, 5);
      const NoGrad no_grad(m.context);
      ProductHessians host, device(m.context);
      std::int64_t on_device = 0, products = 0;
      const ProductObserver to_device = device.observer(), to_host = host.observer();
      const auto pass = [&](const ProductObserver& observer) {
        ForwardResult decided;
        Tensor stream = m.model.embed(m.context, batch);
        for (std::int64_t layer = 0; layer < m.model.config().depth; ++layer)
          stream = m.model.run_block(m.context, layer, stream, batch, kind.rule, decided, observer);
      };
      std::map<std::string, std::int64_t> seen;
      for (int twice = 0; twice < 2; ++twice) {
        pass(to_host);
        pass({[&](const ProductInput& input) {
                to_device(input);
                on_device += input.on_device ? 1 : 0;
                EXPECT_EQ(input.x.empty(), static_cast<bool>(input.on_device));
                seen[input.parameter] = std::max(seen[input.parameter], input.expert + 1);
                ++products;
              },
              to_device.reads()});
      }
      EXPECT_EQ(to_host.reads(), ProductObserver::Reads::Host);
      EXPECT_GT(on_device, 0);
      EXPECT_EQ(on_device == products, kind.name == "dense");
      device.collect();
      for (const auto& [parameter, experts] : seen) {
        for (std::int64_t e = 0; e < experts; ++e) {
          SCOPED_TRACE(fmt::format("{} {}", parameter, e));
          const Hessian *a = host.find(parameter, e), *b = device.find(parameter, e);
          ASSERT_EQ(a == nullptr, b == nullptr);
          if (a == nullptr) continue;
          EXPECT_EQ(a->tokens(), b->tokens());
          Values expected, found;
          for (std::int64_t i = 0; i < a->columns(); ++i) {
            for (std::int64_t j = 0; j < a->columns(); ++j)
              expected.push_back(a->at(i, j)), found.push_back(b->at(i, j));
          }
          EXPECT_LT(relative_difference(found, expected), 1e-6);
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, DeviceSums, ::testing::ValuesIn(testing_support::devices()), device_name);

INSTANTIATE_TEST_SUITE_P(Models, ShownInputs, ::testing::ValuesIn(model_kinds()),
                         [](const auto& of_case) { return of_case.param.name; });

TEST(ShownInputsOf, NoTapeAndABlockWithoutTokens) {
  SmallModel m(DType::F32, small_config(), routed(CausalMethod::Aux, Gate::Sigmoid));
  const Batch batch = m.random_batch(1, 8, 3);
  {
    Tape tape(m.context);
    const Recording recording(m.context, tape);
    ForwardResult decided;
    EXPECT_THROW(m.model.run_block(m.context, 0, m.model.embed(m.context, batch), batch, TopK{}, decided),
                 InternalError);
  }
  m.context.backend().fill(m.model.parameters().get("model.layers.1.router.weight"), 0.0);
  ForwardResult decided;
  std::int64_t shown = 0;
  const Tensor before = m.model.embed(m.context, batch);
  const Tensor after = m.model.run_block(m.context, 1, before, batch, Causal{}, decided,
                                         [&](const ProductInput&) { ++shown; });
  EXPECT_EQ(shown, 0);
  EXPECT_EQ(m.host(after), m.host(before));
}

}  // namespace
}  // namespace fathom::model_test
