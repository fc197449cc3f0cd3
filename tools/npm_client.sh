#!/bin/sh
# The official OpenAI client for JavaScript, which tests/serving/test_npm_client.py uses unmodified; into node_modules/.
npm install --prefix "$(dirname "$0")/.." --no-save --no-package-lock --no-audit --no-fund openai@7.57.0
