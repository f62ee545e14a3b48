"""What surrounds the records in a conversation: roles, the chat template, system prompts and small talk.

A conversation is `<|bos|>`, then for each message `<|ROLE|>`, the content and `<|end|>`, then `<|assistant|>` for the
answer. Content is written with one leading space, at its beginning and after each newline, so that every word is the
same token wherever it stands. The chat template does that for whatever a user types.
"""

BOS, END, SYSTEM, USER, ASSISTANT, PAD = "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>"
SPECIAL_TOKENS = (BOS, END, SYSTEM, USER, ASSISTANT, PAD)  # in the order of their ids, from 0

CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}"
    "{%- set content = message['content'] -%}"
    "{%- else -%}"
    "{%- set parts = namespace(text='') -%}"
    "{%- for part in message['content'] or [] -%}"
    "{%- if part['type'] == 'text' -%}{%- set parts.text = parts.text + part['text'] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set content = parts.text -%}"
    "{%- endif -%}"
    "{%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}"
    "{{- '<|' + role + '|> ' + (content | trim | replace('\\n ', '\\n') | replace('\\n', '\\n ')) + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are ember. Answer from the text.",
    "Answer the question from the records.",
    "Use only the text below.",
    "Answer briefly.",
    "You answer questions about the records below.",
    "Answer from these passages only.",
)
INTRODUCTIONS = ("Here are the records:", "Text:", "Context:", "Read this:", "Passages:", "Here is more:")
LEAD_INS = ("Question:", "My question:", "Please tell me:", "Tell me:")
NOTED = "Noted. What would you like to know?"
RECAP_REQUESTS = ("Recap.", "Tell me all of it again.", "Repeat the facts.")

_ASK_ME = "Ask me about the people, the firms and the towns in your text."
_SCOPE = "I can only answer questions about your text."
SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello.", "Hello!", "Hello", "Hi.", "Hi!", "Hi", "Good morning.", "Good morning!", "Good evening.", "Hi there!",
      "Hey!"),
     "Hello. " + _ASK_ME),
    (("How are you?", "Hello, how are you?", "Hi, how are you today?"), "I am well, thank you. " + _ASK_ME),
    (("Thank you.", "Thank you!", "Thanks!", "Thanks.", "Thanks", "Thank you very much.", "Great, thanks!",
      "Good, thank you."),
     "You are welcome."),
    (("Goodbye.", "Goodbye!", "Bye!", "Bye.", "See you."), "Goodbye."),
    (("Who are you?", "What are you?", "What is your name?", "Are you a robot?"),
     "I am ember, a small model. I answer questions about short records."),
    (("What can you do?", "Help.", "Help!", "How can you help me?", "What can I ask?"), _ASK_ME),
    (("Write a poem.", "Write me a poem.", "Tell me a joke.", "Tell me a story.", "What is the weather today?",
      "What is 2 plus 2?", "Who is the president?", "Translate this.", "Write some code.",
      "What is the capital of France?",
      "What is the meaning of life?", "Sing a song.", "What time is it?"), _SCOPE),
)  # fmt: skip
OUT_OF_SCOPE = _SCOPE
