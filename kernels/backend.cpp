#include "kernels/backend.h"

#include "kernels/decoder.h"

namespace fathom {

Backend::Backend() = default;
Backend::~Backend() = default;

std::unique_ptr<Decoder> Backend::make_decoder(const DecoderModel&) { return nullptr; }

}  // namespace fathom
