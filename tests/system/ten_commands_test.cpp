// docs/serving.md's way from a text to a server, run as it is written there.
#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include <gtest/gtest.h>

#include "tests/system/cli.h"

namespace fathom {
namespace {

// What the page says, between the fences of a section.
std::string block_of(const std::string& title) {
  const std::string page = testing::read_bytes(FATHOM_SOURCE_DIR "/docs/serving.md");
  const std::size_t section = page.find("## " + title + "\n");
  if (section == std::string::npos) return "";
  const std::size_t begin = page.find("```\n", section) + 4;
  return page.substr(begin, page.find("```", begin) - begin);
}

void replace(std::string& text, const std::string& from, const std::string& to) {
  const std::size_t at = text.find(from);
  ASSERT_NE(at, std::string::npos) << from;
  text.replace(at, from.size(), to);
}

TEST(TenCommands, FromATextToAServer) {
  ASSERT_EQ(std::system("command -v curl >/dev/null"), 0) << "curl is missing: scripts/setup.sh";
  std::string commands = block_of("From a text to a server in ten commands");
  EXPECT_EQ(std::count(commands.begin(), commands.end(), '\n'), 10);
  replace(commands, "target_flops=1e12", "target_flops=2e11");  // 27 steps, and 8 s
  // Any free port, as the server says it.
  replace(commands, "--port 8000 &",
          "--port 0 2>serve.log &\nuntil grep -q Serving serve.log; do sleep 0.1; done\n"
          "address=$(grep -o 'http://[0-9.:]*' serve.log | head -n 1)");
  replace(commands, "http://127.0.0.1:8000", "$address");
  const testing::TempFolder folder;
  std::filesystem::create_directory_symlink(FATHOM_SOURCE_DIR "/configs", folder / "configs");
  std::filesystem::create_directory(folder / "bin");
  std::filesystem::create_symlink(FATHOM_BINARY, folder / "bin/fathom");
  std::ofstream(folder / "commands.sh") << "set -e\ntrap 'kill %1; wait' EXIT\n" << commands;
  const std::string line =
      "cd '" + folder.path() +
      "' && export OMP_WAIT_POLICY=passive CUDA_VISIBLE_DEVICES= PATH=\"$PWD/bin:$PATH\" && "
      "timeout 300 bash commands.sh >out 2>err";
  EXPECT_EQ(std::system(line.c_str()), 0) << testing::read_bytes(folder / "err");
  const std::string out = testing::read_bytes(folder / "out");
  const std::size_t answer = out.rfind("{\"choices\"");
  ASSERT_NE(answer, std::string::npos) << out;
  const auto json = nlohmann::json::parse(out.substr(answer));
  EXPECT_EQ(json.at("model"), "model");
  EXPECT_GT(json.at("usage").at("completion_tokens"), 0);
  EXPECT_LE(json.at("usage").at("completion_tokens"), 30);
  EXPECT_NE(json.at("choices").at(0).at("text"), "");
  // Of the trained model and of the quantized one.
  const std::size_t evaluated = out.find("val_causal");
  ASSERT_NE(evaluated, std::string::npos) << out;
  EXPECT_NE(out.find("val_causal", evaluated + 1), std::string::npos) << out;
}

}  // namespace
}  // namespace fathom
