#include "kernels/backend.h"

#include "kernels/decoder.h"
#include "kernels/error.h"

namespace fathom {

Backend::Backend() = default;
Backend::~Backend() = default;

void Backend::linear_add_forward(View y, ConstView base, ConstView x, ConstView w, const LinearShape& s) {
  if (y.size > 0 && base.data == y.data) throw InternalError("[linear] base is y: it would be overwritten");
  linear_forward(y, x, w, s);
  add(y, y, base);
}

bool Backend::choose_tokens(std::span<TokenPick>, ConstView, std::int64_t, std::int64_t) { return false; }

std::unique_ptr<Decoder> Backend::make_decoder(const DecoderModel&) { return nullptr; }

}  // namespace fathom
