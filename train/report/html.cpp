#include "train/report/html.h"

#include <cctype>

#include <fmt/core.h>

#include "src/io/output_file.h"

namespace fathom::report {
namespace {

// Eight colours that stay apart for colour-blind readers (after Okabe and Ito), darker on white and lighter
// on black.
constexpr const char* kStyle = R"css(
:root { color-scheme: light dark;
  --bg: #fbfbfa; --card: #ffffff; --ink: #1d2126; --soft: #5c6670; --line: #e3e5e8; --grid: #ebedf0; --head: #f3f4f5;
  --good: #0b7a52; --warn: #a65300; --deep: 86 180 233;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b0479c; --c4: #b98300; --c5: #3fa3e0; --c6: #8a1f4d; --c7: #6b6f2a; }
@media (prefers-color-scheme: dark) { :root {
  --bg: #14171a; --card: #1b1f23; --ink: #e6e8ea; --soft: #9aa4ae; --line: #31373d; --grid: #2a3036; --head: #22272c;
  --good: #45cf9b; --warn: #f0a35c; --deep: 34 112 190;
  --c0: #57a9e8; --c1: #ff8a4c; --c2: #3ccf9f; --c3: #dd8bd0; --c4: #f0bf4a; --c5: #9bd8ff; --c6: #e0709b; --c7: #c2c66f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 12px; }
h3 { font-size: 15px; margin: 20px 0 8px; overflow-wrap: anywhere; }
p { margin: 0 0 12px; max-width: 80ch; }
.sub, .note, figure .note { color: var(--soft); }
.verdict { margin: 16px 0 20px; padding: 12px 16px; background: var(--card); border: 1px solid var(--line);
  border-left: 3px solid var(--c0); border-radius: 6px; max-width: none; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 14px; text-align: right; vertical-align: top; border-top: 1px solid var(--line); white-space: nowrap; }
thead th { border-top: 0; background: var(--head); vertical-align: bottom; min-width: 120px; max-width: 220px; white-space: normal; overflow-wrap: anywhere; }
tbody th, thead th:first-child { text-align: left; font-weight: 400; color: var(--soft); position: sticky; left: 0;
  background: var(--card); min-width: 130px; max-width: 300px; white-space: normal; }
thead th:first-child { background: var(--head); }
tbody tr.group th { max-width: none; font-weight: 600; color: var(--ink); padding-top: 14px; font-size: 13px; }
td small { color: var(--soft); }
td .prose { display: block; min-width: 24ch; max-width: 60ch; text-align: left; white-space: normal; }
.best { font-weight: 700; color: var(--good); }
.warn { color: var(--warn); font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
.charts .wide { grid-column: 1 / -1; }
@media (max-width: 900px) { .charts { grid-template-columns: minmax(0, 1fr); } main { padding: 20px 12px 48px; } }
figure { margin: 0; padding: 14px 16px 10px; background: var(--card); border: 1px solid var(--line); border-radius: 8px; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: 4px; }
figure .note { font-size: 12.5px; margin: 2px 0 4px; max-width: none; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 12.5px; color: var(--soft); margin: 0 0 6px; padding: 0; list-style: none; }
.legend li { display: flex; align-items: center; gap: 6px; min-width: 0; max-width: 100%; }
.legend span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.legend svg { flex: none; width: 26px; height: 12px; }
.plot { overflow-x: auto; }
.plot svg { display: block; width: 100%; min-width: 460px; height: auto; }
.wide .plot svg { min-width: 640px; }
@media (max-width: 900px) { .wide .plot svg { min-width: 960px; } }
.axis line { stroke: var(--soft); stroke-width: 1; }
.axis line.grid { stroke: var(--grid); }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", "Liberation Sans", "DejaVu Sans", sans-serif; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg text.name { fill: var(--ink); }
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); } .s3 { --c: var(--c3); }
.s4 { --c: var(--c4); } .s5 { --c: var(--c5); } .s6 { --c: var(--c6); } .s7 { --c: var(--c7); }
.line { fill: none; stroke: var(--c); stroke-width: 1.9; stroke-linejoin: round; stroke-linecap: round; }
.dashed { stroke-dasharray: 6 4; }
.faint { stroke-width: 1; opacity: 0.28; }
.mark { fill: var(--c); stroke: var(--c); stroke-width: 1.5; }
.hollow { fill: var(--card); }
.hit { fill: var(--c); opacity: 0; }
.hit:hover { opacity: 0.6; }
.bar { fill: var(--c); }
.bar:hover { opacity: 0.75; }
.tick { stroke: var(--ink); stroke-width: 2; }
.reference { stroke: var(--c); stroke-width: 1.4; stroke-dasharray: 5 4; }
.mark-line { stroke: var(--ink); stroke-width: 1.2; stroke-dasharray: 4 3; }
.heat { fill: var(--c0); } .heat.muted { fill: var(--soft); opacity: 0.3; } .heat-row { fill: var(--grid); }
.routes { margin: 0 0 16px; padding: 12px 16px; background: var(--card); border: 1px solid var(--line); border-radius: 8px; min-width: 0; }
.routes legend { padding: 0 6px; font-weight: 600; }
.pick { position: absolute; opacity: 0; }
.pick + label { display: inline-block; margin: 0 4px 6px 0; padding: 2px 10px; border: 1px solid var(--line); border-radius: 12px; font-size: 13px; cursor: pointer; }
.pick:checked + label { background: var(--c0); border-color: var(--c0); color: var(--card); }
.pick:focus-visible + label { outline: 2px solid var(--ink); outline-offset: 1px; }
.tokens { margin: 8px 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 16px; line-height: 1.85; }
.t { --a: var(--d, 0); padding: 2px 0; background: rgb(var(--deep) / var(--a)); border-radius: 2px; }
.t.mark { color: var(--soft); font-size: 12px; }
.t:hover, .t:focus { outline: 2px solid var(--ink); outline-offset: -1px; }
.tokens .next { display: block; margin: 10px 0 2px; color: var(--soft); font-size: 12.5px; border-top: 1px solid var(--line); }
.depths .t { padding: 1px 10px; margin-right: 2px; border: 1px solid var(--line); color: var(--ink); }
.about { display: block; position: sticky; bottom: 0; min-height: 3.2em; padding: 8px 0 2px; border-top: 1px solid var(--line); background: var(--card); font-size: 13px; white-space: pre-line; overflow-wrap: anywhere; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; background: var(--c); margin-right: 6px; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 0 0 10px; padding: 0 14px; }
summary { cursor: pointer; padding: 9px 0; font-weight: 600; overflow-wrap: anywhere; }
details .scroll { margin-bottom: 14px; }
pre { margin: 0 0 14px; padding: 12px 14px; background: var(--head); border-radius: 6px; overflow-x: auto; font: 12.5px/1.5 ui-monospace, "Liberation Mono", "DejaVu Sans Mono", monospace; }
pre.sample { white-space: pre-wrap; overflow-wrap: anywhere; }
pre b { color: var(--c0); }
footer { margin-top: 40px; color: var(--soft); font-size: 12.5px; border-top: 1px solid var(--line); padding-top: 12px; }
@media print { body { background: #fff; } .charts { display: block; } figure { break-inside: avoid; margin-bottom: 12px; } }
)css";

// The length of the UTF-8 character that starts at text[i], or 0 when there is none.
std::size_t character_length(std::string_view text, std::size_t i) {
  const auto byte = [&](std::size_t k) { return static_cast<unsigned char>(text[k]); };
  const unsigned char first = byte(i);
  const std::size_t length = first < 0x80                    ? 1
                             : first >= 0xC2 && first < 0xE0 ? 2
                             : first >= 0xE0 && first < 0xF0 ? 3
                             : first >= 0xF0 && first < 0xF5 ? 4
                                                             : 0;
  if (length == 0 || i + length > text.size()) return 0;
  for (std::size_t k = 1; k < length; ++k) {
    if ((byte(i + k) & 0xC0) != 0x80) return 0;
  }
  if (first == 0xE0 && byte(i + 1) < 0xA0) return 0;  // overlong
  if (first == 0xED && byte(i + 1) > 0x9F) return 0;  // a surrogate
  if (first == 0xF0 && byte(i + 1) < 0x90) return 0;  // overlong
  if (first == 0xF4 && byte(i + 1) > 0x8F) return 0;  // above U+10FFFF
  return length;
}

}  // namespace

std::string escape(std::string_view text) {
  std::string out;
  out.reserve(text.size() + text.size() / 8);
  for (std::size_t i = 0; i < text.size();) {
    const std::size_t length = character_length(text, i);
    const char c = text[i];
    const bool control =
        length == 1 && ((static_cast<unsigned char>(c) < 0x20 && c != '\n' && c != '\t') || c == 0x7F);
    if (length == 0 || control) {
      out += "\xEF\xBF\xBD";
      ++i;
      continue;
    }
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out.append(text.substr(i, length));
    }
    i += length;
  }
  return out;
}

std::string page(const std::string& title, const std::string& body) {
  return fmt::format(
      "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
      "<title>{}</title>\n<style>{}</style>\n</head>\n<body>\n<main>\n{}</main>\n</body>\n</html>\n",
      escape(title), kStyle, body);
}

bool is_html_file(const std::string& path) {
  constexpr std::size_t kEnough = 256;
  std::string start = start_of_file(path, kEnough);
  start.erase(0, start.find_first_not_of(" \t\r\n"));
  for (char& c : start) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return start.starts_with("<!doctype html") || start.starts_with("<html");
}

std::string render(const Table& table) {
  std::string out = "<div class=\"scroll\"><table><thead><tr>";
  for (const std::string& cell : table.head) out += "<th scope=\"col\">" + cell + "</th>";
  out += "</tr></thead><tbody>\n";
  for (const std::vector<std::string>& row : table.rows) {
    if (row.size() == 1) {
      out += fmt::format("<tr class=\"group\"><th colspan=\"{}\">{}</th></tr>\n", table.head.size(), row[0]);
      continue;
    }
    out += "<tr>";
    for (std::size_t i = 0; i < row.size(); ++i) {
      out += i == 0 ? "<th scope=\"row\">" + row[i] + "</th>" : "<td>" + row[i] + "</td>";
    }
    out += "</tr>\n";
  }
  return out + "</tbody></table></div>\n";
}

}  // namespace fathom::report
