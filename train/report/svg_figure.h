// What every chart shares: its <figure>, its <svg>, its colour classes.
#pragma once

#include <string>

#include "train/report/svg_scale.h"

namespace fathom::report {

/// The class of a run's colour: s0 to s7, repeating.
std::string colour_class(int colour);
/// `legend` and `svg` are HTML; `title` and `note` are text; `attributes` go into the <figure> tag.
std::string figure(const std::string& title, const std::string& legend, const std::string& svg,
                   const std::string& note, const char* attributes = "");
std::string open_svg(const Frame& frame, const std::string& title);
/// A whole picture that says so.
std::string no_data(const Frame& frame, const std::string& title);

}  // namespace fathom::report
