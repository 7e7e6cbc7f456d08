#include "src/model/product_input.h"

#include <cmath>
#include <utility>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/model/blocks.h"

namespace fathom {

namespace {

/// [rows][columns], from rows that may be parts of wider ones.
Tensor whole_rows(Context& c, ConstView x, const LinearShape& s) {
  const Tensor rows = c.empty({s.batch * s.rows, s.in}, x.dtype);
  c.backend().copy_rows(rows, x, s.batch * s.rows, s.in, s.x_row());
  return rows;
}

/// Where the rows of experts lie, on the host.
struct HostSlots {
  std::vector<std::int32_t> rows;  // the row of each slot; -1: none
  std::vector<float> weights;      // [choices][all rows]
  std::size_t all_rows = 0;
};

/// Shows what each expert took.
void show_experts(const ProductObserver& observe, ProductInput input, const std::vector<float>& x,
                  const HostSlots& slots, const std::vector<float>* gates, const LinearShape& s) {
  const bool gated = !input.gates.empty();
  const auto columns = static_cast<std::size_t>(s.in), each = static_cast<std::size_t>(s.rows);
  for (std::size_t e = 0; e < static_cast<std::size_t>(s.batch); ++e) {
    input.expert = static_cast<std::int64_t>(e);
    input.x.clear();
    input.gates.clear();
    for (std::size_t slot = e * each; slot < (e + 1) * each; ++slot) {
      if (slots.rows[slot] < 0) continue;
      const auto row = static_cast<std::size_t>(slots.rows[slot]);
      const auto first = x.begin() + static_cast<std::ptrdiff_t>(slot * columns);
      input.x.insert(input.x.end(), first, first + static_cast<std::ptrdiff_t>(columns));
      if (!gated) continue;
      const float gate = gates != nullptr ? (*gates)[row] : 1.0F;
      input.gates.push_back(gate * slots.weights[e * slots.all_rows + row]);
    }
    if (!input.x.empty()) observe(input);
  }
}

}  // namespace

std::shared_ptr<const std::vector<float>> gates_of(Context& c, const RoutedLayer& routed, Gate gate) {
  const std::vector<double> scores = to_doubles(c.backend(), routed.scores);
  auto gates = std::make_shared<std::vector<float>>();
  for (const std::int32_t row : to_host<std::int32_t>(c.backend(), routed.indices)) {
    const double r = scores[static_cast<std::size_t>(row)];
    switch (gate_kind(gate)) {
      case GateKind::Raw:
        gates->push_back(static_cast<float>(r));
        break;
      case GateKind::Sigmoid:
        gates->push_back(static_cast<float>(1.0 / (1.0 + std::exp(-r))));
        break;
      case GateKind::Tanh:
        gates->push_back(static_cast<float>(std::tanh(r)));
        break;
    }
  }
  return gates;
}

ops::InputTransform Transformer::input_of(const std::string& parameter) const {
  ops::InputTransform input;
  if (parameter.ends_with("down_proj.weight")) input.hadamard = down_;
  if (parameter.ends_with("o_proj.weight")) input.hadamard = heads_;
  if (parameters_.is_packed(parameter)) {
    input.bits = quantization_->activations;
    input.clip = static_cast<float>(quantization_->activation_clip);
  }
  return input;
}

// A product that adds to the stream is multiplied by what follows it; one that another reads is not.
ops::Weight Transformer::product(Context& c, std::int64_t layer, const char* name, const Rows& rows,
                                 const Slots* slots) const {
  const std::string full = layer_name(layer, name);
  ops::Weight weight = parameters_.is_packed(full) ? ops::Weight(parameters_.packed(full))
                                                   : ops::Weight(parameters_.get(full));
  if (quantization_) weight = weight.of(input_of(full));
  if (rows.observe == nullptr) return weight;
  const bool adds = full.ends_with("o_proj.weight") || full.ends_with("down_proj.weight");
  return weight.shown_to([&c, &rows, full, adds, slots](ConstView x, const LinearShape& s) {
    if (s.rows == 0) return;
    ProductInput input{.parameter = full, .columns = s.in, .x = {}, .on_device = {}, .gates = {}};
    const Tensor whole = whole_rows(c, x, s);
    const bool multiplied = slots != nullptr || (adds && rows.gates);
    if (rows.observe->reads() == ProductObserver::Reads::DeviceWherePossible && !multiplied) {
      input.on_device = whole;
      (*rows.observe)(input);
      return;
    }
    input.x = to_floats(c.backend(), whole);
    if (slots == nullptr) {
      if (adds && rows.gates) input.gates = *rows.gates;
      (*rows.observe)(input);
      return;
    }
    HostSlots host{to_host<std::int32_t>(c.backend(), slots->dispatch.rows),
                   to_floats(c.backend(), slots->weights), 0};
    host.all_rows = static_cast<std::size_t>(slots->weights.dim(1));
    input.gates.assign(adds ? 1 : 0, 1.0F);
    const std::vector<float> all = std::move(input.x);
    show_experts(*rows.observe, std::move(input), all, host, rows.gates.get(), s);
  });
}

}  // namespace fathom
