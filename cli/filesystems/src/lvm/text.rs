//! The text in which LVM describes a group: names with values, and sections of them.

use crate::Error;

/// Sections within sections; four are in use.
const DEPTH_MAX: usize = 16;

/// A value, or a section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    Number(u64),
    Text(String),
    List(Vec<Value>),
    Section(Section),
}

/// Names and what they stand for, in the order of the text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Section(pub(super) Vec<(String, Value)>);

impl Section {
    pub(super) fn get(&self, name: &str) -> Option<&Value> {
        self.0.iter().find(|(found, _)| found == name).map(|(_, value)| value)
    }

    pub(super) fn number(&self, name: &str) -> Result<u64, Error> {
        match self.get(name) {
            Some(Value::Number(number)) => Ok(*number),
            Some(Value::Text(_) | Value::List(_) | Value::Section(_)) | None => Err(lacks(name, "number")),
        }
    }

    pub(super) fn text(&self, name: &str) -> Result<&str, Error> {
        match self.get(name) {
            Some(Value::Text(text)) => Ok(text),
            Some(Value::Number(_) | Value::List(_) | Value::Section(_)) | None => Err(lacks(name, "text")),
        }
    }

    pub(super) fn list(&self, name: &str) -> Result<&[Value], Error> {
        match self.get(name) {
            Some(Value::List(list)) => Ok(list),
            Some(Value::Number(_) | Value::Text(_) | Value::Section(_)) | None => Err(lacks(name, "list")),
        }
    }

    /// The section of this name; an empty one when there is none, as a group without volumes has it.
    pub(super) fn section(&self, name: &str) -> Result<&Section, Error> {
        static EMPTY: Section = Section(Vec::new());
        match self.get(name) {
            Some(Value::Section(section)) => Ok(section),
            Some(Value::Number(_) | Value::Text(_) | Value::List(_)) => Err(lacks(name, "section")),
            None => Ok(&EMPTY),
        }
    }
}

fn lacks(name: &str, kind: &str) -> Error {
    Error::damaged("", format!("it has no {kind} {name:?}"))
}

/// Parses a whole text.
pub(super) fn parse(text: &str) -> Result<Section, Error> {
    let mut parser = Parser { rest: text, length: text.len() };
    let section = parser.section(0)?;
    parser.space();
    match parser.rest {
        "" => Ok(section),
        _ => Err(parser.wrong("a name")),
    }
}

struct Parser<'text> {
    rest: &'text str,
    length: usize,
}

impl<'text> Parser<'text> {
    fn wrong(&self, expected: &str) -> Error {
        let at = self.length - self.rest.len();
        let found: String = self.rest.chars().take(16).collect();
        Error::damaged("", format!("byte {at} of its text should begin {expected}, and is {found:?}"))
    }

    /// Skips what is between words: white space, and comments to the end of their line.
    fn space(&mut self) {
        loop {
            self.rest = self.rest.trim_start_matches([' ', '\t', '\r', '\n', '\0']);
            let Some(comment) = self.rest.strip_prefix('#') else { return };
            self.rest = comment.find('\n').map_or("", |end| &comment[end..]);
        }
    }

    fn take(&mut self, mark: char) -> bool {
        self.space();
        let rest = self.rest.strip_prefix(mark);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    fn word(&mut self) -> &'text str {
        self.space();
        let in_word = |c: char| c.is_ascii_alphanumeric() || "_-+./:@".contains(c);
        let end = self.rest.find(|c| !in_word(c)).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        word
    }

    /// Names and values up to what is neither.
    fn section(&mut self, depth: usize) -> Result<Section, Error> {
        if depth > DEPTH_MAX {
            return Err(Error::damaged("", format!("its sections are deeper than {DEPTH_MAX}")));
        }
        let mut entries = Vec::new();
        loop {
            let name = self.word();
            if name.is_empty() {
                return Ok(Section(entries));
            }
            let value = if self.take('{') {
                let section = self.section(depth + 1)?;
                if !self.take('}') {
                    return Err(self.wrong("'}'"));
                }
                Value::Section(section)
            } else if self.take('=') {
                self.value()?
            } else {
                return Err(self.wrong("'{' or '='"));
            };
            entries.push((name.to_owned(), value));
        }
    }

    fn value(&mut self) -> Result<Value, Error> {
        if !self.take('[') {
            return self.plain();
        }
        let mut list = Vec::new();
        while !self.take(']') {
            list.push(self.plain()?);
            if !self.take(',') && !self.rest.trim_start().starts_with(']') {
                return Err(self.wrong("',' or ']'"));
            }
        }
        Ok(Value::List(list))
    }

    fn plain(&mut self) -> Result<Value, Error> {
        if self.take('"') {
            return self.quoted().map(Value::Text);
        }
        let before = self.rest;
        let word = self.word();
        let number = word.parse();
        number.map(Value::Number).map_err(|_| {
            self.rest = before;
            self.wrong("a number or a text")
        })
    }

    fn quoted(&mut self) -> Result<String, Error> {
        let mut text = String::new();
        let mut letters = self.rest.char_indices();
        while let Some((at, letter)) = letters.next() {
            match letter {
                '"' => {
                    self.rest = &self.rest[at + 1..];
                    return Ok(text);
                }
                '\\' => text.extend(letters.next().map(|(_, letter)| letter)),
                letter => text.push(letter),
            }
        }
        Err(self.wrong("a text that ends"))
    }
}
