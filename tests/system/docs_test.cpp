// docs/commands.md names every flag of every command, and no flag that a command does not have.
#include <map>
#include <regex>
#include <set>
#include <sstream>

#include <gtest/gtest.h>

#include "tests/system/cli.h"

namespace fathom {
namespace {

std::set<std::string> flags_in(const std::string& text) {
  static const std::regex flag("--[a-z][a-z0-9-]+");
  return {std::sregex_token_iterator(text.begin(), text.end(), flag), std::sregex_token_iterator()};
}

TEST(Docs, CommandsListsTheFlagsOfEveryCommand) {
  const testing::TempFolder folder;
  const std::set<std::string> common{"--json", "--verbose", "--device", "--threads", "--help", "--version"};
  std::istringstream page(testing::read_bytes(FATHOM_SOURCE_DIR "/docs/commands.md"));
  std::map<std::string, std::string> sections;
  std::string command;
  static const std::regex title(
      "## fathom ([a-z]+( "
      "(prepare|inspect|synthetic|train|decode|prefill|requests|load|batch|speculative|copy|gemm|attention|"
      "ops|plan|run|"
      "status|fit|"
      "report))?)"
      ".*");
  for (std::string line; std::getline(page, line);) {
    std::smatch match;
    if (std::regex_match(line, match, title)) command = match[1];
    if (!command.empty()) sections[command] += line + "\n";
  }
  EXPECT_EQ(sections.size(), 33u);
  for (const auto& [name, text] : sections) {
    const testing::Outcome help = testing::fathom_command(folder, name + " --help");
    ASSERT_EQ(help.status, 0) << name;
    std::set<std::string> documented = flags_in(text);
    std::set<std::string> has;
    std::istringstream lines(help.out);
    static const std::regex option("  (-[a-zA-Z],)?(--[a-z][a-z0-9-]+).*");
    for (std::string line; std::getline(lines, line);) {
      std::smatch match;
      if (std::regex_match(line, match, option)) has.insert(match[2]);
    }
    for (const std::string& flag : common) {
      documented.erase(flag);
      has.erase(flag);
    }
    EXPECT_EQ(documented, has) << name;
  }
}

}  // namespace
}  // namespace fathom
