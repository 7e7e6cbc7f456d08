// The page at /: a prompt, the answer as it comes, and how deep the model went. It asks the routes that every
// client asks, and nothing from elsewhere.
#pragma once

#include "serve/http/exchange.h"

namespace fathom::serve {

HttpReply page_reply();

}  // namespace fathom::serve
