// The frame of a self-contained page: escaping, style, tables.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace fathom::report {

/// Text as HTML, safe in elements and in quoted attributes. Bytes that are no UTF-8, and control characters,
/// become the replacement character.
std::string escape(std::string_view text);

/// The whole page around `body`, which is HTML.
std::string page(const std::string& title, const std::string& body);
/// Whether the file starts as a page does.
bool is_html_file(const std::string& path);

/// A table whose first column heads its rows. Cells are HTML. A row of one cell heads a group.
struct Table {
  std::vector<std::string> head;
  std::vector<std::vector<std::string>> rows;
};
std::string render(const Table& table);

}  // namespace fathom::report
