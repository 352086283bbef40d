"""The sampling of completions: rows that grow a token at a time, compiled steps, folded weights."""
