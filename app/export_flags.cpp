#include "app/export_flags.h"

#include <array>
#include <filesystem>

#include "src/io/output_file.h"

namespace fathom::app {

ExportOptions ExportFlags::options() const {
  return {.dtype = precision == "bf16" ? DType::BF16 : DType::F32, .tokenizer = tokenizer};
}

void require_another_folder(const std::string& output, const std::string& model) {
  // A model may be given as a file of its folder.
  const std::array inputs = {model, std::filesystem::path(model).parent_path().string()};
  std::error_code error;
  const bool is_file = std::filesystem::is_regular_file(model, error);
  require_no_input("-o", output, std::span(inputs).first(is_file ? 2 : 1));
}

void add_export_flags(CLI::App& sub, ExportFlags& flags) {
  sub.add_option("model", flags.model, "Run folder, checkpoint file or exported model")->required();
  sub.add_option("-o,--output", flags.output, "The folder to write")->required();
  sub.add_option("--precision", flags.precision,
                 "fp32 | bf16: of the weights (of quantize: of all that are not of few bits)")
      ->capture_default_str()
      ->check(CLI::IsMember({"fp32", "bf16"}));
  sub.add_option("--tokenizer", flags.tokenizer,
                 "Tokenizer, if neither in the run folder nor where the config says");
}

}  // namespace fathom::app
