#include "app/text_stream.h"

#include <algorithm>

namespace fathom::app {

std::string TextStream::add(std::int32_t id) {
  if (stopped_) return "";
  ids_.push_back(id);
  text_ = tokenizer_.decode(ids_);
  std::size_t end = text_.size();
  for (const std::string& stop : stops_) {
    const std::size_t at = text_.find(stop);
    if (at == std::string::npos || at > end) continue;
    end = at;
    stopped_ = true;
  }
  text_.resize(end);
  if (!stopped_) {
    for (const std::string& stop : stops_) {
      std::size_t begun = std::min(stop.size() - 1, text_.size());
      while (begun > 0 && text_.compare(text_.size() - begun, begun, stop, 0, begun) != 0) --begun;
      end = std::min(end, text_.size() - begun);
    }
  }
  if (end <= given_) return "";
  const std::string news = text_.substr(given_, end - given_);
  given_ = end;
  return news;
}

std::string TextStream::rest() {
  const std::string news = text_.substr(std::min(given_, text_.size()));
  given_ = text_.size();
  return news;
}

}  // namespace fathom::app
