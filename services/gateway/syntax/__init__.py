"""What a reply is made of besides text: reasoning, tool calls, structure. Reading it, and making models keep to it.

Reading order: `families`, `call_scanner`, `tool_parsers`, `reasoning_parser`, `reply_parser`; then `grammar_text`.
"""
