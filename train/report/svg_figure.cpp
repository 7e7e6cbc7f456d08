#include "train/report/svg_figure.h"

#include <fmt/core.h>

#include "train/report/html.h"

namespace fathom::report {
namespace {

constexpr int kColours = 8;

}  // namespace

std::string colour_class(int colour) {
  return fmt::format("s{}", ((colour % kColours) + kColours) % kColours);
}

std::string figure(const std::string& title, const std::string& legend, const std::string& svg,
                   const std::string& note, const char* attributes) {
  std::string out = fmt::format("<figure{}>\n<figcaption>{}</figcaption>\n", attributes, escape(title));
  if (!legend.empty()) out += "<ul class=\"legend\">" + legend + "</ul>\n";
  out += "<div class=\"plot\">" + svg + "</div>\n";
  if (!note.empty()) out += "<p class=\"note\">" + escape(note) + "</p>\n";
  return out + "</figure>\n";
}

std::string open_svg(const Frame& f, const std::string& title) {
  return fmt::format("<svg viewBox=\"0 0 {:.0f} {:.0f}\" role=\"img\" aria-label=\"{}\">", f.width, f.height,
                     escape(title));
}

std::string no_data(const Frame& f, const std::string& title) {
  return open_svg(f, title) +
         fmt::format("<text x=\"{:.0f}\" y=\"{:.0f}\" text-anchor=\"middle\">no data</text></svg>",
                     f.width / 2, f.height / 2);
}

}  // namespace fathom::report
