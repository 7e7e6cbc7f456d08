#include "kernels/backend.h"

#include <vector>

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

void Backend::linear_codes_add_forward(View y, ConstView base, const PackedView& x, const PackedView& w,
                                       const LinearShape& s) {
  if (y.size > 0 && base.data == y.data) throw InternalError("[linear] base is y: it would be overwritten");
  linear_codes_forward(y, x, w, s);
  add(y, y, base);
}

bool Backend::make_codes(View, View, const CodeSource&, const RowQuantization&) { return false; }

namespace {

class WaitingReadback final : public Readback {
 public:
  WaitingReadback(Backend& backend, std::size_t bytes) : backend_(backend), host_(bytes) {}
  void begin(const void* source) override { backend_.copy_to_host(host_.data(), source, host_.size()); }
  const void* wait() override { return host_.data(); }

 private:
  Backend& backend_;
  std::vector<std::byte> host_;
};

}  // namespace

std::unique_ptr<Readback> Backend::make_readback(std::size_t bytes) {
  return std::make_unique<WaitingReadback>(*this, bytes);
}

bool Backend::choose_tokens(std::span<TokenPick>, ConstView, std::int64_t, std::int64_t) { return false; }

std::unique_ptr<Decoder> Backend::make_decoder(const DecoderModel&) { return nullptr; }

}  // namespace fathom
