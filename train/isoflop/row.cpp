#include "train/isoflop/row.h"

#include <algorithm>
#include <variant>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "kernels/error.h"
#include "src/config/scalar.h"
#include "train/report/csv.h"

namespace fathom::isoflop {
namespace {

using Json = nlohmann::ordered_json;

using Member = std::variant<std::string Row::*, std::int64_t Row::*, double Row::*,
                            std::optional<double> Row::*, std::optional<std::int64_t> Row::*>;

struct Column {
  const char* name;
  Member member;
};

const Column kColumns[] = {
    {"sweep", &Row::sweep},
    {"cell", &Row::cell},
    {"role", &Row::role},
    {"family", &Row::family},
    {"kind", &Row::kind},
    {"status", &Row::status},
    {"reason", &Row::reason},
    {"budget", &Row::budget},
    {"width", &Row::width},
    {"depth", &Row::depth},
    {"heads", &Row::heads},
    {"hidden", &Row::hidden},
    {"seed", &Row::seed},
    {"lr", &Row::lr},
    {"params_total", &Row::params_total},
    {"params_active", &Row::params_active},
    {"params_embedding", &Row::params_embedding},
    {"flops_per_token_forward", &Row::flops_per_token_forward},
    {"flops_per_token_train", &Row::flops_per_token_train},
    {"steps", &Row::steps},
    {"tokens", &Row::tokens},
    {"flops", &Row::flops},
    {"store_tokens", &Row::store_tokens},
    {"passes", &Row::passes},
    {"max_passes", &Row::max_passes},
    {"val_loss", &Row::val_loss},
    {"val_topk", &Row::val_topk},
    {"val_causal", &Row::val_causal},
    {"best_val", &Row::best_val},
    {"seconds", &Row::seconds},
    {"step_seconds", &Row::step_seconds},
    {"memory_bytes", &Row::memory_bytes},
    {"resumes", &Row::resumes},
    {"device", &Row::device},
    {"git_sha", &Row::git_sha},
    {"trained", &Row::trained},
};

std::string print(const std::string& x) { return x; }
std::string print(std::int64_t x) { return std::to_string(x); }
std::string print(double x) { return print_number(x); }
template <typename T>
std::string print(const std::optional<T>& x) {
  return x ? print(*x) : "";
}

bool read(std::string_view text, std::string& to) {
  to = text;
  return true;
}
bool read(std::string_view text, std::int64_t& to) {
  const auto x = read_integer(text);
  if (x) to = *x;
  return x.has_value();
}
bool read(std::string_view text, double& to) {
  const auto x = read_number(text);
  if (x) to = *x;
  return x.has_value();
}
template <typename T>
bool read(std::string_view text, std::optional<T>& to) {
  to.reset();
  if (text.empty()) return true;
  T value{};
  if (!read(text, value)) return false;
  to = value;
  return true;
}

Json to_value(const std::string& x) { return x; }
Json to_value(std::int64_t x) { return x; }
Json to_value(double x) { return x; }
template <typename T>
Json to_value(const std::optional<T>& x) {
  return x ? to_value(*x) : Json(nullptr);
}

Json json_of(const Row& row) {
  Json j;
  for (const Column& c : kColumns)
    j[c.name] = std::visit([&](auto member) { return to_value(row.*member); }, c.member);
  return j;
}

// The records of a CSV; a quoted cell may hold commas, quotes and line ends.
class CsvReader {
 public:
  CsvReader(std::string_view text, const std::string& name) : text_(text), name_(name) {}

  bool next(std::vector<std::string>& cells) {
    cells.clear();
    if (at_ >= text_.size()) return false;
    line_ = next_line_;
    while (true) {
      cells.push_back(cell());
      if (at_ >= text_.size()) return true;
      const char c = text_[at_++];
      if (c == ',') continue;
      if (c == '\r' && at_ < text_.size() && text_[at_] == '\n') ++at_;
      ++next_line_;
      return true;
    }
  }
  [[noreturn]] void fail(const std::string& problem) const {
    throw UserError(fmt::format("{}:{}: {}", name_, line_, problem),
                    "Expected the CSV that fathom isoflop report writes.");
  }

 private:
  std::string cell() {
    std::string out;
    if (at_ < text_.size() && text_[at_] == '"') {
      for (++at_;; ++at_) {
        if (at_ >= text_.size()) fail("a quoted cell does not end.");
        if (text_[at_] == '\n') ++next_line_;
        if (text_[at_] != '"') {
          out += text_[at_];
        } else if (at_ + 1 < text_.size() && text_[at_ + 1] == '"') {
          out += '"';
          ++at_;
        } else {
          ++at_;
          break;
        }
      }
      if (at_ < text_.size() && text_[at_] != ',' && text_[at_] != '\n' && text_[at_] != '\r')
        fail("text follows a quoted cell.");
      return out;
    }
    while (at_ < text_.size() && text_[at_] != ',' && text_[at_] != '\n' && text_[at_] != '\r')
      out += text_[at_++];
    return out;
  }

  std::string_view text_;
  const std::string& name_;
  std::size_t at_ = 0;
  std::int64_t line_ = 1, next_line_ = 1;
};

}  // namespace

std::string to_csv(std::span<const Row> rows) {
  std::string out;
  for (const Column& c : kColumns) out += (out.empty() ? "" : ",") + std::string(c.name);
  out += "\n";
  for (const Row& row : rows) {
    bool first = true;
    for (const Column& c : kColumns) {
      if (!first) out += ',';
      first = false;
      out += report::csv_cell(std::visit([&](auto member) { return print(row.*member); }, c.member));
    }
    out += "\n";
  }
  return out;
}

std::vector<Row> read_csv(std::string_view text, const std::string& name) {
  CsvReader reader(text, name);
  std::vector<std::string> cells;
  if (!reader.next(cells)) reader.fail("the file is empty.");
  std::vector<const Column*> columns;
  for (const std::string& head : cells) {
    const auto* found = std::find_if(std::begin(kColumns), std::end(kColumns),
                                     [&](const Column& c) { return head == c.name; });
    columns.push_back(found == std::end(kColumns) ? nullptr : found);
  }
  for (const Column& c : kColumns) {
    if (std::find(columns.begin(), columns.end(), &c) == columns.end())
      reader.fail(fmt::format("the column {} is missing.", c.name));
  }
  std::vector<Row> rows;
  while (reader.next(cells)) {
    if (cells.size() == 1 && cells[0].empty()) continue;
    if (cells.size() != columns.size())
      reader.fail(fmt::format("the line has {} cells, the head {}.", cells.size(), columns.size()));
    Row row;
    for (std::size_t i = 0; i < cells.size(); ++i) {
      if (columns[i] == nullptr) continue;
      if (!std::visit([&](auto member) { return read(cells[i], row.*member); }, columns[i]->member))
        reader.fail(fmt::format("{} is '{}', which is no value for it.", columns[i]->name, cells[i]));
    }
    rows.push_back(std::move(row));
  }
  return rows;
}

std::string to_json(const Row& row) {
  return json_of(row).dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::string to_json(std::span<const Row> rows) {
  Json list = Json::array();
  for (const Row& row : rows) list.push_back(json_of(row));
  return list.dump(-1, ' ', false, Json::error_handler_t::replace);
}

Row row_from_json(std::string_view text, const std::string& name) {
  const Json j = Json::parse(text, nullptr, false);
  if (!j.is_object()) throw UserError(name + " is not a JSON object.", "Remove it to run its cell again.");
  Row row;
  for (const Column& c : kColumns) {
    const auto found = j.find(c.name);
    if (found == j.end() || found->is_null()) continue;
    const std::string value = found->is_string() ? found->get<std::string>() : found->dump();
    if (!std::visit([&](auto member) { return read(value, row.*member); }, c.member))
      throw UserError(fmt::format("{}: {} is {}, which is no value for it.", name, c.name, found->dump()),
                      "Remove the file to run its cell again.");
  }
  return row;
}

}  // namespace fathom::isoflop
