// Renders chats with a Modelfile's template as Ollama does: Go's text/template over the messages, with its functions
// and options (template.Execute and collate in its package template). Reads {"template": …, "chats": […]}.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

func main() {
	var input struct {
		Template string      `json:"template"`
		Chats    [][]Message `json:"chats"`
	}
	if err := json.NewDecoder(os.Stdin).Decode(&input); err != nil {
		panic(err)
	}
	functions := template.FuncMap{"json": func(v any) string { b, _ := json.Marshal(v); return string(b) }}
	parsed := template.Must(template.New("").Option("missingkey=zero").Funcs(functions).Parse(input.Template))
	texts := []string{}
	for _, chat := range input.Chats {
		var system []string
		var messages []*Message
		for i := range chat {
			if chat[i].Role == "system" {
				system = append(system, chat[i].Content)
			}
			if n := len(messages); n > 0 && messages[n-1].Role == chat[i].Role {
				messages[n-1].Content += "\n\n" + chat[i].Content
			} else {
				messages = append(messages, &chat[i])
			}
		}
		var text strings.Builder
		values := map[string]any{"System": strings.Join(system, "\n\n"), "Messages": messages, "Response": ""}
		if err := parsed.Execute(&text, values); err != nil {
			panic(err)
		}
		texts = append(texts, text.String())
	}
	if err := json.NewEncoder(os.Stdout).Encode(texts); err != nil {
		panic(err)
	}
}
