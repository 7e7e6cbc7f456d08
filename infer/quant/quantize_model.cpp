#include "infer/quant/quantize_model.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "infer/pieces.h"
#include "kernels/error.h"

namespace fathom {

namespace {

/// Squares of a kind's weights, and of what is lost of them.
struct Squares {
  double weights = 0, errors = 0;
};

/// One parameter's matrices, one below the other.
class Packer {
 public:
  Packer(const ParameterSpec& spec, const PackedFormat& format) : spec_(spec), format_(format) {}

  void add(const MatrixToQuantize& from, const QuantizedMatrix& m, Squares& squares) {
    const std::int64_t groups = from.rows * format_.groups(), size = from.rows * format_.columns;
    if (m.rows != from.rows || m.columns != format_.columns || m.bits != format_.bits ||
        m.group != format_.group || std::ssize(m.codes) != size || std::ssize(m.scales) != groups) {
      throw InternalError(fmt::format("[quantize] {} became {} x {} of {} bits in groups of {}", spec_.name,
                                      m.rows, m.columns, m.bits, m.group));
    }
    if (!std::all_of(m.scales.begin(), m.scales.end(), [](float s) { return std::isfinite(s); }))
      throw UserError(fmt::format("{} holds weights that are not finite.", spec_.name));
    const int most = (1 << (m.bits - 1)) - 1;
    if (std::any_of(m.codes.begin(), m.codes.end(),
                    [&](int code) { return code < -most - 1 || code > most; }))
      throw InternalError(fmt::format("[quantize] {} became codes of more than {} bits", spec_.name, m.bits));
    const auto columns = static_cast<std::size_t>(format_.columns),
               group = static_cast<std::size_t>(format_.group);
    const auto code_bytes = static_cast<std::size_t>(format_.code_bytes());
    const std::size_t before = codes_.size();
    codes_.resize(before + static_cast<std::size_t>(m.rows) * code_bytes);
    std::vector<Squares> rows(static_cast<std::size_t>(m.rows));
    for_pieces(m.rows, std::max<std::int64_t>(1, 16384 / format_.columns), [&](auto begin, auto end) {
      for (auto r = static_cast<std::size_t>(begin); r < static_cast<std::size_t>(end); ++r) {
        auto* const to = reinterpret_cast<std::uint8_t*>(codes_.data() + before + r * code_bytes);
        pack_codes({to, code_bytes}, std::span(m.codes).subspan(r * columns, columns), format_);
        for (std::size_t k = 0; k < columns; ++k) {
          const double w = from.values[r * columns + k];
          const double held =
              static_cast<double>(m.scales[r * (columns / group) + k / group]) * m.codes[r * columns + k];
          rows[r].weights += w * w;
          rows[r].errors += (w - held) * (w - held);
        }
      }
    });
    for (const Squares& row : rows) {  // in their order: the same sums, however many threads there were
      squares.weights += row.weights;
      squares.errors += row.errors;
    }
    scales_.insert(scales_.end(), m.scales.begin(), m.scales.end());
  }

  PackedTensor upload(Context& c) const { return upload_packed(c, spec_.shape, format_, codes_, scales_); }

 private:
  const ParameterSpec& spec_;
  PackedFormat format_;
  std::vector<std::byte> codes_;
  std::vector<float> scales_;
};

}  // namespace

struct ModelQuantizer::Impl {
  Context& c;
  const Transformer& from;
  Quantization quantization;
  std::unique_ptr<Transformer> to;
  std::map<std::string, Squares> squares;
};

ModelQuantizer::ModelQuantizer(Context& c, const Transformer& model, const Quantization& quantization)
    : impl_(new Impl{c,
                     model,
                     quantization,
                     std::make_unique<Transformer>(c, model.config(), model.routing(), quantization),
                     {}}) {
  ParameterSet& to = impl_->to->parameters();
  for (const ParameterSpec& spec : to.specs()) {
    if (!spec.is_packed) c.backend().copy(to.master(spec.name), model.parameters().master(spec.name));
  }
  to.refresh_working_copy(c);
}
ModelQuantizer::~ModelQuantizer() = default;

std::vector<std::string> ModelQuantizer::parameters() const {
  std::vector<std::string> names;
  for (const ParameterSpec& spec : impl_->to->parameters().specs()) {
    if (spec.is_packed) names.push_back(spec.name);
  }
  return names;
}

void ModelQuantizer::quantize(const std::string& parameter, const MatrixQuantizer& quantize) {
  ParameterSet& to = impl_->to->parameters();
  const auto found = std::find_if(to.specs().begin(), to.specs().end(),
                                  [&](const ParameterSpec& s) { return s.name == parameter; });
  if (found == to.specs().end() || !found->is_packed)
    throw InternalError(fmt::format("[quantize] {} is no parameter of few bits", parameter));
  const ParameterSpec& spec = *found;
  const std::vector<float> values = to_floats(impl_->c.backend(), impl_->from.parameters().master(spec.name));
  const std::int64_t experts = spec.shape.rank() == 3 ? spec.shape[0] : 1;
  MatrixToQuantize matrix{spec.name, 0, {}, spec.shape[-2], impl_->quantization.format(spec)};
  Packer packer(spec, matrix.format);
  const std::size_t each = values.size() / static_cast<std::size_t>(experts);
  for (; matrix.expert < experts; ++matrix.expert) {
    matrix.values = std::span(values).subspan(static_cast<std::size_t>(matrix.expert) * each, each);
    packer.add(matrix, quantize(matrix), impl_->squares[product_kind(spec)]);
  }
  to.put_packed(spec.name, packer.upload(impl_->c));
}

Transformer& ModelQuantizer::model() { return *impl_->to; }

QuantizedModel ModelQuantizer::finish() {
  QuantizedModel result{std::move(impl_->to), {}};
  for (const auto& [kind, s] : impl_->squares)
    result.relative_error[kind] = s.weights > 0 ? std::sqrt(s.errors / s.weights) : 0;
  return result;
}

QuantizedModel quantize_model(Context& c, const Transformer& model, const Quantization& quantization,
                              const MatrixQuantizer& quantize) {
  ModelQuantizer quantizer(c, model, quantization);
  for (const std::string& parameter : quantizer.parameters()) quantizer.quantize(parameter, quantize);
  return quantizer.finish();
}

}  // namespace fathom
