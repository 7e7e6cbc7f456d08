#include "kernels/backend.h"

#include "kernels/decoder.h"

namespace fathom {

Backend::Backend() = default;
Backend::~Backend() = default;

bool Backend::choose_tokens(std::span<TokenPick>, ConstView, std::int64_t, std::int64_t) { return false; }

std::unique_ptr<Decoder> Backend::make_decoder(const DecoderModel&) { return nullptr; }

}  // namespace fathom
