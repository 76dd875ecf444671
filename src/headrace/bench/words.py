"""Common English words, each one token in most vocabularies: what random chats are made of."""

# fmt: off
WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school",
    "state", "family", "student", "group", "country", "problem", "hand", "part", "place", "case",
    "week", "company", "system", "program", "question", "work", "night", "point", "home", "water",
    "room", "mother", "area", "money", "story", "fact", "month", "lot", "right", "study", "book", "eye",
    "job", "word", "business", "issue", "side", "kind", "head", "house", "service", "friend", "father",
    "power", "hour", "game", "line", "end", "member", "law", "car", "city", "name", "team", "minute",
    "idea", "body", "back", "parent", "face", "level", "office", "door", "health", "person", "art",
    "war", "history", "party", "result", "change", "morning", "reason", "research", "girl", "guy",
    "moment", "air", "teacher", "force", "order", "food", "paper", "space", "ground", "form", "event",
    "figure", "street", "image", "phone", "data", "list", "table", "range", "north", "south", "east",
    "west", "red", "blue", "green", "white", "black", "small", "large", "long", "short", "old", "new",
    "good", "high", "low", "early", "late", "open", "close", "true", "real", "full", "clear", "free",
    "strong", "simple", "common", "single", "final", "great", "public", "local", "social", "make",
    "take", "come", "see", "know", "get", "give", "find", "think", "tell", "become", "show", "leave",
    "feel", "put", "bring", "begin", "keep", "hold", "write", "stand", "hear", "let", "mean", "set",
    "meet", "run", "pay", "sit", "speak", "lie", "lead", "read", "grow", "lose", "fall", "send",
    "build", "spend", "cut", "win", "add", "wait", "serve", "move", "live", "believe",
)
# fmt: on
