#include "app/export_flags.h"

namespace fathom::app {

ExportOptions ExportFlags::options() const {
  return {.dtype = precision == "bf16" ? DType::BF16 : DType::F32, .tokenizer = tokenizer};
}

void add_export_flags(CLI::App& sub, ExportFlags& flags) {
  sub.add_option("model", flags.model, "Run folder, checkpoint file or exported model")->required();
  sub.add_option("-o,--output", flags.output, "The folder to write")->required();
  sub.add_option("--precision", flags.precision, "fp32 | bf16: of the weights")
      ->capture_default_str()
      ->check(CLI::IsMember({"fp32", "bf16"}));
  sub.add_option("--tokenizer", flags.tokenizer,
                 "Tokenizer, if neither in the run folder nor where the config says");
}

}  // namespace fathom::app
